from collections import Counter

import pytest

from hunyuan_train.data.captions import render_captions

FIELDS = {
    "short": "A cat sleeps",
    "dense": "A grey cat sleeps on a red sofa in the sun.",
    "background": "a bright living room",
    "style": "documentary",
    "shot_type": "close-up",
    "camera movement": "pan left",
}
ALL = (
    "A cat sleeps. A grey cat sleeps on a red sofa in the sun. a bright living room. documentary. "
    "close-up. pan left."
)
SENTENCES = [text.rstrip(".") + "." for text in FIELDS.values()]


def used(text):
    """The fields of a rendering in its order."""
    return sorted((s for s in SENTENCES if s in text), key=text.index)


def test_plain_text_has_one_rendering_whatever_the_settings():
    assert render_captions(" a cat \n", "a.mp4", 8, 0.5) == ("a cat",)


@pytest.mark.parametrize("caption", ["", " \n", {}, {"short": " ", "dense": ""}])
def test_empty_caption_has_none(caption):
    assert render_captions(caption, "a.mp4", 3, 0.1) == ()


def test_first_rendering_keeps_all_fields_in_their_order_even_if_all_are_dropped():
    assert render_captions(FIELDS, "a.mp4", 1, 1.0) == (ALL,)
    assert render_captions(FIELDS, "a.mp4", 5, 1.0)[0] == ALL


def test_renderings_are_fixed_by_file_and_number_alone():
    three = render_captions(FIELDS, "a.mp4", 3, 0.3)
    assert render_captions(FIELDS, "a.mp4", 6, 0.3)[: len(three)] == three
    assert render_captions(FIELDS, "b.mp4", 3, 0.3) != three
    # Changing these words changes every store's captions.
    assert three[1:] == (
        "pan left. close-up. A cat sleeps. a bright living room. documentary.",
        "documentary. A cat sleeps. close-up. pan left. "
        "A grey cat sleeps on a red sofa in the sun.",
    )


def test_fields_are_left_out_at_the_given_rate_and_the_rest_is_permuted():
    drop = 0.3
    rendered = [r for n in range(400) for r in render_captions(FIELDS, f"{n}.mp4", 3, drop)[1:]]
    orders = [used(text) for text in rendered]
    assert [" ".join(order) for order in orders] == rendered
    kept = Counter(sentence for order in orders for sentence in order)
    for sentence in SENTENCES:  # 5 standard deviations of a share of 800 draws are 0.08
        assert kept[sentence] / len(rendered) == pytest.approx(1 - drop, abs=0.08)
    first = Counter(order[0] for order in orders)
    assert all(count > len(rendered) / 12 for count in (first[s] for s in SENTENCES))


def test_one_field_always_stays_and_each_may_be_it():
    rendered = {render_captions(FIELDS, f"{n}.mp4", 2, 1.0)[1] for n in range(200)}
    assert rendered == set(SENTENCES)


def test_without_dropping_every_rendering_has_all_fields():
    for text in render_captions(FIELDS, "a.mp4", 10, 0.0):
        assert sorted(used(text)) == sorted(SENTENCES)


def test_equal_renderings_are_merged():
    assert render_captions({"short": "a cat", "style": " "}, "a.mp4", 5, 0.5) == ("a cat.",)
    assert len(render_captions({"short": "a", "dense": "b"}, "a.mp4", 50, 0.0)) == 2


@pytest.mark.parametrize("text", ["A cat!", "A cat?", "猫。"])
def test_sentence_ends_are_not_doubled(text):
    assert render_captions({"short": text, "style": "film"}, "a", 1, 0) == (f"{text} film.",)
