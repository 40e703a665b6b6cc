"""The prompt templates are the released ones, and drift is noticed."""

import hashlib
from dataclasses import replace

import pytest

from hunyuan_train.encoders.templates import MEDIA, TEMPLATES, check_media, check_template

RELEASED = {
    "image": (241, 36, "e6794c248e31c8efee73f33028bbb095324ec79e0b05dfae78b373b0abd4fb98"),
    "video": (512, 95, "a52f68dde3637b127592fffe9e2483a5d0563987a49db6ddb9b06146f2ba7cb5"),
}


@pytest.mark.parametrize("media", MEDIA)
def test_templates_have_the_released_fingerprint(media: str) -> None:
    template = TEMPLATES[media]
    digest = hashlib.sha256(template.text.encode()).hexdigest()
    assert (len(template.text), template.crop_start, digest) == RELEASED[media]
    assert (template.num_chars, template.sha256) == (len(template.text), digest)
    check_template(media, template)


def test_video_template_equals_the_one_of_diffusers() -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    assert TEMPLATES["video"].text == DEFAULT_PROMPT_TEMPLATE["template"]
    assert TEMPLATES["video"].crop_start == DEFAULT_PROMPT_TEMPLATE["crop_start"]


@pytest.mark.parametrize("media", MEDIA)
def test_one_changed_character_is_refused(media: str) -> None:
    template = TEMPLATES[media]
    changed = replace(template, text=template.text.replace("color", "colour"))
    message = rf"the {media} prompt template has {template.num_chars + 1} characters"
    with pytest.raises(ValueError, match=message):
        check_template(media, changed)
    same_length = replace(template, text=template.text.replace("color", "Color"))
    with pytest.raises(ValueError, match="and SHA-256"):
        check_template(media, same_length)


def test_fill_keeps_braces_of_the_caption() -> None:
    template = TEMPLATES["image"]
    prompt = template.fill("a {curly} {} caption")
    assert prompt == template.prefix + "a {curly} {} caption<|eot_id|>"
    assert template.fill("x") == template.text.format("x")


def test_unknown_media_is_refused() -> None:
    with pytest.raises(ValueError, match="media='audio' is not known"):
        check_media("audio")
