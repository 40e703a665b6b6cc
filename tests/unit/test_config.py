"""Composing configs: defaults, overrides, and one clear sentence for everything that is wrong."""

from pathlib import Path

import pytest

from hunyuan_train.config.compose import (
    compose_config,
    config_difference,
    load_config,
    save_config,
)


def test_defaults_compose_and_survive_a_round_trip(tmp_path: Path) -> None:
    cfg = compose_config(["model=hunyuan_video_13b_cfg", "text=hunyuan", "run.seed=7"])
    assert (cfg.model.hidden_size, cfg.model.guidance_embed, cfg.run.seed) == (3072, True, 7)
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg


def test_saved_config_takes_overrides_and_shows_the_difference(tmp_path: Path) -> None:
    cfg = compose_config()
    save_config(cfg, tmp_path / "config.yaml")
    changed = load_config(tmp_path / "config.yaml", ["optimizer.lr=0.5", "sample.prompts=[a, b]"])
    assert config_difference(cfg, changed) == [
        "optimizer.lr: 0.0001 -> 0.5",
        "sample.prompts: [] -> ['a', 'b']",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.hidden_sise=3",
            r"model\.hidden_sise is not a field.*did you mean model\.hidden_size",
        ),
        ("+model.extra=3", r"model\.extra is not a field"),
        ("+foo.bar=1", r"foo is not a field"),
        ("optimizer.lr=fast", r"optimizer\.lr: Value 'fast'.*Float"),
        ("stage.steps=1.5", r"stage\.steps: Value '1\.5'.*Integer"),
        ("optimizer.schedule=step", r"optimizer\.schedule: .*'step'.*constant, cosine, linear"),
        ("optimizer.lr=-1", r"optimizer\.lr=-1\.0 must be above 0"),
        ("model=huge", r"model=huge does not exist; choose from .*tiny"),
        ("stage.steps", r"'stage\.steps' is not an override; write section\.field=value"),
        ("parallel.zero_stage=5", r"parallel\.zero_stage=5 is unknown; choose 0 1 2 3"),
        ("model.rope_axes=[4,4,4]", r"model\.rope_axes=\[4, 4, 4\] adds up to 12"),
        ("model.text_dim=32", r"model\.text_dim=32 does not match text\.text_dim=64"),
        ("model.in_channels=4", r"model\.in_channels=4 does not match vae\.latent_channels=16"),
        ("optimizer.warmup_steps=5000", r"warmup_steps=5000 does not end before stage\.steps"),
        ("data.durations=[16]", r"16 is not 4n\+1"),
        ("sample.height=100", r"height=100 is not a multiple of 16"),
        ("sample.frames=24", r"frames=24 is not 4n\+1"),
    ],
)
def test_bad_overrides_are_named(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config([override])


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)optimizer\.lr=-1.*parallel\.zero_stage=9"):
        compose_config(["optimizer.lr=-1", "parallel.zero_stage=9"])


def test_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.yaml does not exist; give run\.dir"):
        load_config(tmp_path / "config.yaml")


def test_tables_take_new_names_without_ceremony() -> None:
    cfg = compose_config(
        [
            "data.sources.films.latents=/some/where.d",
            "data.sources.films.weight=0.5",
            "data.sources={pictures: {latents: there}}",
            "data.media_shares={image:0.3,video:0.7}",
            "data.anchor_shares.256=1.0",
            "data.batches.17x64x64=2",
            "+data.batches.1x64x64=3",
        ]
    )
    assert cfg.data.sources["films"].latents == "/some/where.d"
    assert cfg.data.sources["films"].weight == 0.5
    assert cfg.data.sources["pictures"].latents == "there"
    assert cfg.data.media_shares == {"image": 0.3, "video": 0.7}
    assert cfg.data.anchor_shares == {256: 1.0}
    assert cfg.data.batches == {"17x64x64": 2, "1x64x64": 3}
    with pytest.raises(ValueError, match="wight"):
        compose_config(["data.sources.films.wight=1"])
    with pytest.raises(ValueError, match="media_shares"):
        compose_config(["data.media_shares.image=much"])
    with pytest.raises(ValueError, match="bucket '17x64' is not FRAMESxHEIGHTxWIDTH"):
        compose_config(["data.batches.17x64=2"])


def test_tables_survive_a_round_trip(tmp_path: Path) -> None:
    cfg = compose_config(
        ["data.sources.a.latents=x", "data.anchor_shares.64=1", "data.batches.1x64x64=3"]
    )
    save_config(cfg, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == cfg
