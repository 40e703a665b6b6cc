"""The latent service put together: encoder processes, and the store of a rank that asks them."""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.config.compose import config_dict
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.index import Index
from hunyuan_train.data.online import OnlineStore
from hunyuan_train.data.parts import key_of
from hunyuan_train.data.scan import index_sources
from hunyuan_train.data.service_board import Board
from hunyuan_train.data.service_greeting import connect
from hunyuan_train.data.service_library import Library, service_folder
from hunyuan_train.data.service_server import EncoderServer, empty_captions
from hunyuan_train.data.service_store import ServiceStore
from hunyuan_train.data.store import StoreMeta
from hunyuan_train.data.wire import Garbled
from hunyuan_train.encoders.text import build_text_encoder
from hunyuan_train.encoders.weights import folder_fingerprint
from hunyuan_train.engine.local_encoders import LocalEncoders
from hunyuan_train.engine.precompute import build_latent_encoder
from hunyuan_train.engine.precompute_work import config_hash, source_key, text_key
from hunyuan_train.runtime.dist import World, gather_objects

log = logging.getLogger(__name__)

_POLL_S = 0.2
_REPORT_S = 15.0
_NO_NUMBERS = ("batch_size",)
"""Fields of ``text`` that change no feature."""


@dataclass(frozen=True, slots=True)
class PrecomputeKeys:
    """The names that precompute gives to what it stores; see ``service_library.Keys``."""

    config: str
    """:func:`config_hash`."""
    text_fingerprint: str
    storage_dtype: str

    @classmethod
    def of(cls, cfg: RunConfig, meta: StoreMeta) -> "PrecomputeKeys":
        """Return the names for what encoders with the fingerprints of ``meta`` make."""
        config = config_hash(cfg.data, meta.vae_fingerprint)
        return cls(config, meta.text_fingerprint, str(cfg.data.storage_dtype))

    def source(self, digest: str, suffix: str) -> str:
        """Name the latents of a file."""
        return source_key(digest, suffix, self.config)

    def text(self, caption: str, media: str) -> str:
        """Name the features of a caption."""
        return text_key(self.text_fingerprint, self.storage_dtype, caption, media)


def build_online(cfg: RunConfig, device: torch.device) -> OnlineStore:
    """Open the clips of ``data.source`` for encoding on a device.

    Raises:
        ValueError: a setting is missing, the encoders cannot be loaded, or no clip is usable.
    """
    check_clips(cfg)
    text = build_text_encoder(cfg.text, device)
    return OnlineStore(cfg.data, build_latent_encoder(cfg.run.vae, device), text)


def check_clips(cfg: RunConfig) -> None:
    """Check that the settings name clips and encoders.

    Raises:
        ValueError: one is missing.
    """
    mode = cfg.data.encode
    if not cfg.run.vae:
        raise ValueError(
            f"run.vae is empty, and data.encode={mode} encodes with it; set it to the folder of "
            "the VAE (config.json, model.safetensors)"
        )
    if cfg.data.sources:
        raise ValueError(
            f"data.sources mixes latent stores, and data.encode={mode} has none; use data.source, "
            "or precompute each source and set data.encode=ahead"
        )


def settings_key(cfg: RunConfig) -> str:
    """Hash all settings and weights that the service's numbers depend on.

    It does not depend on where folders lie, so machines may mount them elsewhere.

    Raises:
        ValueError: run.vae is not a folder.
    """
    if not Path(cfg.run.vae).is_dir():
        raise ValueError(f"run.vae={cfg.run.vae} is not a folder; set it to that of the VAE")
    text: dict[str, Any] = {}
    for name, value in config_dict(cfg.text).items():
        if name.endswith("_folder"):
            text[name] = folder_fingerprint(value) if value else ""
        elif name not in _NO_NUMBERS:
            text[name] = str(value)
    return key_of(config_hash(cfg.data, folder_fingerprint(cfg.run.vae)), text)


def service_meta(cfg: RunConfig, store: OnlineStore) -> StoreMeta:
    """Return what a service over ``store`` says of its samples."""
    return replace(store.meta, storage_dtype=str(cfg.data.storage_dtype))


def build_server(cfg: RunConfig, device: torch.device, host: str) -> EncoderServer:
    """Load the encoders onto a device and register where training finds them.

    Raises:
        ValueError: as in :func:`build_online`.
    """
    store = build_online(cfg, device)
    keys = PrecomputeKeys.of(cfg, store.meta)
    meta = service_meta(cfg, store)
    library = Library(cfg.data, keys, meta, store.root, parts=True)
    board = Board(service_folder(cfg.data))
    return EncoderServer(
        store, library, cfg.data, settings_key(cfg), board, host=host, device=str(device)
    )


def open_service(cfg: RunConfig, world: World) -> ServiceStore:
    """Open the clips of ``data.source``, encoded by processes of their own; every rank calls it.

    Raises:
        ValueError: a setting is missing, no clip is usable, or no encoder came and this rank's
            own cannot be loaded.
    """
    check_clips(cfg)
    index = Index.open(index_sources(cfg.data, cfg.text.max_length))
    settings = settings_key(cfg)
    children: LocalEncoders | None = None
    if cfg.data.service.processes and world.local_rank == 0:
        children = LocalEncoders(cfg, str(world.device))
    own: list[OnlineStore] = []

    def build() -> OnlineStore:
        if not own:
            log.warning("this rank loads the encoders onto %s and encodes by itself", world.device)
            own.append(build_online(cfg, world.device))
        return own[0]

    found: tuple[dict[str, Any], dict[str, Tensor]] | None = None
    if world.rank == 0:
        found = _first_encoder(cfg, settings, index.folder.name)
        if found is None:
            store = build()
            dtype: torch.dtype = getattr(torch, str(cfg.data.storage_dtype))
            found = asdict(service_meta(cfg, store)), empty_captions(store, dtype)
    about, empty = gather_objects(found)[0]
    meta = StoreMeta(**about)
    root = Path(cfg.data.source)
    root = root if root.is_dir() else root.parent
    library = Library(cfg.data, PrecomputeKeys.of(cfg, meta), meta, root, parts=False)
    closing: Callable[[], None] | None = children.close if children else None
    return ServiceStore(cfg.data, index, meta, empty, settings, library, build, closing=closing)


def _first_encoder(
    cfg: RunConfig, settings: str, index: str
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Wait for an encoder and return what it says, None if none comes in time."""
    board, patience = Board(service_folder(cfg.data)), cfg.data.service.silence_s
    started = reported = time.monotonic()
    refused: dict[str, int] = {}
    while True:
        for entry, mark in board.entries():
            if entry.settings != settings or refused.get(entry.id) == mark:
                continue
            try:
                line, welcome = connect(entry, settings, index, patience)
            except (OSError, Garbled) as error:
                refused[entry.id] = mark
                log.warning("encoder %s on %s is not reached: %s", entry.id, entry.node, error)
                continue
            line.close()
            return welcome.about, welcome.empty
        now = time.monotonic()
        if now - started >= cfg.data.service.start_s:
            return None
        if now - reported >= _REPORT_S:
            reported = now
            log.warning(
                "no encoder is in %s yet, after %.0f s of data.service.start_s=%g; start them with "
                "`hunyuan-train serve` and the same settings, or set data.service.processes",
                *(board.folder, now - started, cfg.data.service.start_s),
            )
        time.sleep(_POLL_S)
