"""Encoders of their own: frames, cache, what a rank gets from them, and what it does without."""

import os
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
import torch

from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.fetch import EncodingStore
from hunyuan_train.data.index import Index
from hunyuan_train.data.online import OnlineStore
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.service_board import Board
from hunyuan_train.data.service_cache import Cache
from hunyuan_train.data.service_config import ServiceConfig
from hunyuan_train.data.service_greeting import connect
from hunyuan_train.data.service_library import Library, service_folder
from hunyuan_train.data.service_server import EncoderServer, empty_captions
from hunyuan_train.data.service_store import ServiceStore
from hunyuan_train.data.store import LatentStore
from hunyuan_train.data.wire import Garbled, pack, unpack
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.engine.precompute import precompute
from hunyuan_train.engine.precompute_work import config_hash
from hunyuan_train.engine.serving import PrecomputeKeys
from tests.support.media_factory import FakeText, FakeVae, marked_frames, write_image, write_video
from tests.support.sample_store import make_loader


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """3 images, 4 clips."""
    root = tmp_path_factory.mktemp("service") / "clips"
    for index in range(3):
        write_image(root / f"i{index}.png", 64, 64 + 32 * (index % 2), level=30 * index)
        (root / f"i{index}.txt").write_text(" ".join(["word"] * (1 + index % 3)))
    for index in range(4):
        write_video(root / f"v{index}.mp4", marked_frames(6 + 4 * (index % 2), 64, 64))
        (root / f"v{index}.txt").write_text(f"clip {index}")
    return root


def config(clips, latents, **settings):
    service = {"start_s": 5, "fallback_s": 0.2, "silence_s": 3, "in_flight": 2}
    return DataConfig(
        **{
            "source": str(clips),
            "latents": str(latents),
            "anchors": [64],
            "durations": [1, 5, 9],
            "assign": "every",
            "encode": "service",
            "max_tokens": 64,
            "max_batch": 3,
            "workers": 1,
            **settings,
            "service": ServiceConfig(**{**service, **settings.get("service", {})}),
        }
    )


class Service:
    """Encoders and a rank's store in this process."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.vaes = []
        self.servers = []
        self.threads = []
        self.built = 0
        self.online = self.encoder()
        self.meta = replace(self.online.meta, storage_dtype=str(cfg.storage_dtype))
        config = config_hash(cfg, self.meta.vae_fingerprint)
        self.keys = PrecomputeKeys(config, self.meta.text_fingerprint, str(cfg.storage_dtype))
        self.store = None

    def encoder(self, gain=1.0):
        self.vaes.append(FakeVae(gain))
        return OnlineStore(self.cfg, LatentEncoder(self.vaes[-1]), FakeText())

    def build(self):
        self.built += 1
        return self.online

    def library(self, parts):
        return Library(self.cfg, self.keys, self.meta, self.online.root, parts=parts)

    def serve(self, gain=1.0, settings="same"):
        board = Board(service_folder(self.cfg))
        store = self.encoder(gain)
        server = EncoderServer(store, self.library(True), self.cfg, settings, board)
        thread = threading.Thread(target=server.serve, daemon=True)
        thread.start()
        self.servers.append(server)
        self.threads.append(thread)
        return server

    def open(self, expected=None):
        empty = empty_captions(self.online, getattr(torch, self.meta.storage_dtype))
        index = Index.open(self.online.index.folder)
        self.store = ServiceStore(
            self.cfg, index, self.meta, empty, "same", self.library(False), self.build, "data"
        )
        until = time.monotonic() + 5
        expected = len(self.servers) if expected is None else expected
        while len(self.store.pool.encoders) < expected and time.monotonic() < until:
            time.sleep(0.01)
        return self.store

    def close(self):
        if self.store is not None:
            self.store.close()
        for server in self.servers:
            server.stop()
        for thread in self.threads:
            thread.join()


@pytest.fixture
def service(clips, tmp_path, request):
    made = []

    def make(latents="latents", **settings):
        made.append(Service(config(clips, tmp_path / latents, **settings)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def same(ours, theirs):
    pairs = [
        (ours.mean, theirs.mean), (ours.std, theirs.std),
        (ours.text.states, theirs.text.states), (ours.text.pooled, theirs.text.pooled),
    ]  # fmt: skip
    if theirs.stills is not None:
        pairs.append((ours.stills, theirs.stills))
    return all(torch.equal(left, right) for left, right in pairs)


def test_a_frame_comes_back_as_it_was_or_is_refused():
    tensors = {
        "half": torch.randn(2, 3).half(), "brain": torch.randn(4).bfloat16(),
        "none": torch.zeros(0, 5), "one": torch.tensor(3.0),
    }  # fmt: skip
    frame = pack({"op": "x", "n": 1}, tensors)
    header, found = unpack(frame)
    assert header == {"op": "x", "n": 1}
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    for place in (0, 5, len(frame) // 2, len(frame) - 1):
        broken = bytearray(frame)
        broken[place] ^= 1
        with pytest.raises(Garbled):
            unpack(broken)
    for length in (0, 3, 20, len(frame) - 1):
        with pytest.raises(Garbled):
            unpack(frame[:length])
    with pytest.raises(Garbled, match="bytes where"):
        unpack(frame + b"x")


def test_the_cache_keeps_what_was_used_last_and_finds_torn_files(tmp_path):
    cache = Cache(tmp_path, 100_000)
    value = {"a": torch.arange(2048, dtype=torch.float32)}
    for number in range(10):
        cache.put(f"{number:02d}key", value)
        os.utime(cache._path(f"{number:02d}key"), (1000 + number, 1000 + number))
    assert torch.equal(cache.get("00key")["a"], value["a"])  # used: the youngest now
    for number in range(10, 15):
        cache.put(f"{number:02d}key", value)
    until = time.monotonic() + 5
    while cache.nbytes > 100_000 and time.monotonic() < until:
        time.sleep(0.01)  # a thread cleans
    assert cache.nbytes <= 100_000
    assert cache.get("00key") is not None
    assert cache.get("01key") is None
    path = cache._path("14key")
    raw = path.read_bytes()
    for torn in (raw[: len(raw) // 2], raw[:-1] + bytes([raw[-1] ^ 1]), b""):
        path.write_bytes(torn)
        assert cache.get("14key") is None
        assert not path.exists()
        cache.put("14key", value)
        assert torch.equal(cache.get("14key")["a"], value["a"])
    path.write_bytes(cache._path("13key").read_bytes())
    assert cache.get("14key") is None, "an entry in another's place"
    cache.note("15key", "a text")
    assert cache.noted("15key") == "a text"
    assert cache.noted("16key") is None
    off = Cache(tmp_path, 0)
    off.put("99key", value)
    assert off.get("99key") is None
    assert off.get("13key") is None


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"storage_dtype": "float32"}, id="float32"),
        pytest.param({"condition_frames": ["first", "last"]}, id="stills", marks=pytest.mark.again),
    ],
)
def test_samples_are_those_of_precompute_first_and_second_time(service, clips, tmp_path, settings):
    cfg = config(clips, tmp_path / "ahead", **settings)
    precompute(cfg, LatentEncoder(FakeVae()), FakeText())
    ahead = LatentStore.open(str(tmp_path / "ahead"), cfg, "data")
    made = service(**settings)
    server = made.serve()
    store = made.open()
    assert not isinstance(store, EncodingStore)
    assert len(store.index) == len(ahead.index) > 6
    total = len(store.index)
    clips_encoded = []
    for _ in range(2):
        for number in range(total):
            sample = store.load(number, 0)
            assert same(sample, ahead.load(number, 0))
            if "storage_dtype" in settings:
                assert same(sample, made.online.load(number, 0))
        clips_encoded.append(made.vaes[1].clips)
    for media in ("image", "video"):
        assert torch.equal(store.empty(media).states, ahead.empty(media).states)
    assert clips_encoded[0] == clips_encoded[1] > total // 2
    counts = store.counts()
    assert counts["service_encoded"] == server.counts.encoded <= total
    assert counts["service_cached"] == 2 * total - server.counts.encoded
    assert counts["service_fallback"] == counts["service_lost_encoders"] == 0
    assert f"1 encoders connected (cpu of {server.entry.node}); " in store.describe()


def test_what_precompute_stored_is_not_encoded_again(service, clips, tmp_path):
    precompute(config(clips, tmp_path / "latents"), LatentEncoder(FakeVae()), FakeText())
    made = service(service={"cache_gib": 0})
    ahead = LatentStore.open(str(tmp_path / "latents"), made.cfg, "data")
    server = made.serve()
    store = made.open()
    calls = [vae.calls for vae in made.vaes]
    for number in range(len(store.index)):
        assert same(store.load(number, 0), ahead.load(number, 0))
    assert [vae.calls for vae in made.vaes] == calls
    assert server.counts.hits == len(store.index)


def test_a_new_caption_costs_its_text_alone(service, clips, tmp_path):
    copy = tmp_path / "clips"
    copy.mkdir()
    for path in clips.glob("v*"):
        (copy / path.name).write_bytes(path.read_bytes())
        os.utime(copy / path.name, (1e9, 1e9))
    first = service(source=str(copy))
    first.serve()
    store = first.open()
    for number in range(len(store.index)):
        store.load(number, 0)
    first.close()
    for path in copy.glob("*.txt"):
        path.write_text("something else")
    second = service(source=str(copy))
    server = second.serve()
    store = second.open()
    clips_before = second.vaes[-1].clips
    for number in range(len(store.index)):
        assert same(store.load(number, 0), reference(second, number))
    assert second.vaes[-1].clips == clips_before
    assert server.counts.encoded > 0


def reference(made, number):
    """A row as this process encodes it, in the dtype of storage."""
    sample = made.online.load(number, 0)
    text = replace(
        sample.text, states=sample.text.states.half().float(),
        pooled=sample.text.pooled.half().float(),
    )  # fmt: skip
    return replace(
        sample, mean=sample.mean.half().float(), std=sample.std.half().float(), text=text
    )


def test_a_file_that_changes_meanwhile_is_not_kept(service, clips, tmp_path):
    copy = tmp_path / "clips"
    copy.mkdir()
    for name in ("v1.mp4", "v1.txt"):
        (copy / name).write_bytes((clips / name).read_bytes())
    made = service(source=str(copy), service={"fallback_s": 0})
    server = made.serve()
    encode = server._store.encode

    def changed(*batch):
        with (copy / "v1.mp4").open("ab") as file:
            file.write(b"x")
        return encode(*batch)

    server._store.encode = changed
    store = made.open()
    wanted = reference(made, 0)
    for times in (1, 2):
        assert same(store.load(0, 0), wanted)
        assert server.counts.encoded == times
    server._store.encode = encode
    store.load(0, 0)
    store.load(0, 0)
    assert server.counts.encoded == 3


def test_loader_draws_the_same_batches_as_from_a_store(service, clips, tmp_path):
    cfg = config(clips, tmp_path / "ahead")
    precompute(cfg, LatentEncoder(FakeVae()), FakeText())
    ahead = LatentStore.open(str(tmp_path / "ahead"), cfg, "data")
    made = service()
    servers = [made.serve(), made.serve()]
    loaders = [make_loader([store], cfg, seed=3) for store in (ahead, made.open())]
    for _ in range(6):
        for stored, served in zip(*(loader.next_step() for loader in loaders), strict=True):
            assert stored.sample_ids == served.sample_ids
            for name in ("mean", "std", "text", "text_mask", "pooled", "empty_text"):
                assert torch.equal(getattr(stored, name), getattr(served, name))
    assert "latent service: 2 encoders" in loaders[1].describe()
    for loader in loaders:
        loader.end()
    assert all(server.counts.encoded for server in servers), "both have worked"


def listen(line):
    """Receive until there is something else than signs of life."""
    while line.receive()[0]["op"] == "alive":
        pass


def test_requests_are_bounded_and_excess_is_hung_up_on(service):
    made = service(service={"in_flight": 2, "cache_gib": 0})
    server = made.serve()
    gate = threading.Event()
    encode = server._store.encode

    def slow(requests, decoded):
        gate.wait()
        return encode(requests, decoded)

    server._store.encode = slow
    store = made.open()
    workers = store.open_workers()
    futures = [workers.submit("x", number, 0) for number in range(8)]
    time.sleep(0.3)
    assert server.desk.most_waiting == 2
    assert not any(future.done() for future in futures)
    line, _ = connect(server.entry, "same", store.meta.index, 3.0)
    for number in range(3):
        line.send({"id": number, "number": number, "variant": 0})
    with pytest.raises(ConnectionError):
        listen(line)
    gate.set()
    for number, future in enumerate(futures):
        assert same(future.result(10), reference(made, number))
    assert server.desk.most_waiting <= 5
    stopped = workers.submit("x", 0, 0)
    workers.close()
    assert stopped.cancelled() or stopped.done()


def test_strangers_and_other_settings_or_weights_are_refused(service, caplog):
    made = service(service={"fallback_s": 0})
    entry = made.serve().entry
    made.serve(settings="others")
    made.serve(gain=2.0)
    for wrong, why in (
        (replace(entry, token="0" * 64), "hung up|reset"),
        (replace(entry, settings="others"), "it serves settings same"),
    ):
        with pytest.raises((Garbled, ConnectionError), match=why):
            connect(wrong, wrong.settings, made.meta.index, 3.0)
    store = made.open(expected=1)
    until = time.monotonic() + 5
    while caplog.text.count("is not asked") < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert "has other settings and is not asked" in caplog.text
    assert "vae_fingerprint=" in caplog.text
    assert [found.id for found in store.pool.encoders] == [entry.id]


def test_a_rank_goes_on_by_itself_and_back_to_an_encoder(service, caplog):
    made = service(service={"cache_gib": 0, "fallback_s": 0.1})
    server = made.serve()
    store = made.open()
    store.load(0, 0)
    server.stop()
    for number in range(len(store.index)):
        assert same(store.load(number, 0), reference(made, number))
    assert made.built == 1
    counts = store.counts()
    assert counts["service_fallback"] == len(store.index)
    assert counts["service_lost_encoders"] == 1
    assert "0 encoders left" in caplog.text
    fresh = made.serve()
    until = time.monotonic() + 5
    while not store.pool.encoders and time.monotonic() < until:
        time.sleep(0.02)
    assert same(store.load(1, 0), reference(made, 1))
    assert fresh.counts.encoded == 1


@pytest.mark.parametrize(
    "answer",
    ["garbage", *(pytest.param(name, marks=pytest.mark.again) for name in ("shape", "stranger"))],
)
def test_an_encoder_that_answers_what_cannot_be_is_not_asked_again(service, caplog, answer):
    made = service(service={"cache_gib": 0, "fallback_s": 60})
    bad, good = made.serve(), made.serve()
    send = bad.desk._send

    def spoil(client, header, tensors=None):
        if tensors is None:
            send(client, header)
        elif answer == "garbage":
            with suppress(OSError):
                client.line._socket.sendall(b"HTL1" + b"\xff" * 20)
        elif answer == "shape":
            send(client, header, {**tensors, "mean": tensors["mean"][:1]})
        else:
            send(client, {**header, "id": 10**6}, tensors)

    bad.desk._send = spoil
    store = made.open()
    workers = store.open_workers()
    futures = [workers.submit("x", number, 0) for number in range(len(store.index))]
    for number, future in enumerate(futures):
        assert same(future.result(10), reference(made, number))
    assert "is not asked again" in caplog.text
    assert store.counts()["service_lost_encoders"] == 1
    assert store.counts()["service_encoded"] == len(store.index) == good.counts.encoded
    assert made.built == 0


def test_an_encoder_that_hangs_is_given_up(service, caplog):
    """Its process lives, so signs of life come, but no answer."""
    made = service(service={"cache_gib": 0, "timeout_s": 1, "fallback_s": 0})
    server = made.serve()
    gate = threading.Event()
    encode = server._store.encode
    server._store.encode = lambda *batch: gate.wait() and encode(*batch)
    store = made.open()
    assert same(store.load(0, 0), reference(made, 0))
    assert "has not answered for 1 s" in caplog.text
    assert store.counts()["service_fallback"] == 1
    gate.set()


def test_bad_samples_are_those_of_the_online_store(service, clips, tmp_path):
    copy = tmp_path / "clips"
    copy.mkdir()
    for path in clips.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    made = service(source=str(copy), service={"fallback_s": 0})
    server = made.serve()
    store = made.open()
    raw = bytearray((copy / "v1.mp4").read_bytes())
    (copy / "v1.mp4").write_bytes(raw[: len(raw) // 2])
    numbers = [n for n in range(len(store.index)) if store.index.row(n).source == "v1.mp4"]
    for _ in range(2):
        with pytest.raises(SampleError) as ours:
            store.load(numbers[0], 0)
        with pytest.raises(SampleError) as theirs:
            made.online.load(numbers[0], 0)
        assert str(ours.value) == str(theirs.value)
    assert server.counts.bad == 2
    server.stop()
    with pytest.raises(SampleError) as alone:
        store.load(numbers[0], 0)
    assert str(alone.value) == str(theirs.value)


def test_latents_beyond_the_storage_dtype_are_a_bad_sample(service):
    made = service(service={"fallback_s": 0})
    made.vaes.clear()
    made.online = made.encoder(gain=1e6)
    made.meta = replace(made.online.meta, storage_dtype="float16")
    made.serve(gain=1e6)
    store = made.open()
    with pytest.raises(SampleError, match=r"are not finite in torch\.float16") as error:
        store.load(0, 0)
    assert error.value.reason is Reason.not_finite
    assert store.counts()["service_fallback"] == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"in_flight": 0}, "data.service.in_flight=0 is below 1"),
        ({"nice": 20}, "above 19"),
        ({"devices": ["cpu", "gpu:1"]}, "devices entry gpu:1 is no device"),
        ({"fallback_s": -2}, "neither seconds nor -1"),
        ({"cache_gib": -1}, "data.service.cache_gib=-1 is below 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ServiceConfig(**setting)
    assert asdict(ServiceConfig())
