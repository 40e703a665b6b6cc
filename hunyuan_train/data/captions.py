"""Captions as the text encoder reads them: plain text, or renderings of an object of fields.

A structured caption describes one clip from several sides (short, dense, background, style, shot
type, lighting, atmosphere, camera movement, ...). Renderings with fields left out and in another
order make prompts of many lengths and patterns out of one description, as the HunyuanVideo paper
does. Which they are depends on the clip's file and the number of the rendering alone, so a store
has the same captions whoever makes it.
"""

from collections.abc import Mapping

from hunyuan_train.runtime.seed import keyed_generator

_SENTENCE_ENDS = (".", "!", "?", "…", "。", "！", "？")
_SEED = 0
"""Not the run's seed: captions belong to the data, and stores are shared between runs."""


def render_captions(
    caption: str | Mapping[str, str], file: str, variants: int, field_drop: float
) -> tuple[str, ...]:
    """Return the renderings of a caption, without repeats; none of an empty caption.

    Args:
        caption: Text, which has one rendering; or texts by field name.
        file: Identity of the clip.
        variants: Renderings to make of an object. The first keeps all fields in their order.
        field_drop: Probability with which a further rendering leaves out a field; one always stays.
    """
    if isinstance(caption, str):
        text = caption.strip()
        return (text,) if text else ()
    fields = [text.strip() for text in caption.values() if text.strip()]
    if not fields:
        return ()
    rendered = [_join(fields)]
    for variant in range(1, variants):
        generator = keyed_generator(_SEED, "caption", file, variant)
        draws = generator.random(len(fields))
        kept = [index for index, draw in enumerate(draws) if draw >= field_drop]
        kept = kept or [int(draws.argmax())]
        rendered.append(_join([fields[kept[place]] for place in generator.permutation(len(kept))]))
    return tuple(dict.fromkeys(rendered))


def _join(fields: list[str]) -> str:
    return " ".join(text if text.endswith(_SENTENCE_ENDS) else f"{text}." for text in fields)
