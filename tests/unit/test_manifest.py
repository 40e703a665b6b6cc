import json

import pytest
from media_factory import write_image

from hunyuan_train.data.captions import render_captions
from hunyuan_train.data.manifest import list_sources
from hunyuan_train.data.quarantine import Reason


def write_manifest(folder, rows):
    path = folder / "manifest.jsonl"
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def test_folder_is_read_recursively_with_text_files_beside_the_media(tmp_path):
    write_image(tmp_path / "b" / "two.png")
    (tmp_path / "b" / "two.txt").write_text("  second \n")
    (tmp_path / "one.mp4").write_bytes(b"x")
    (tmp_path / "one.txt").write_bytes("\ufefffirst ünï".encode())
    (tmp_path / "notes.md").write_text("not media")
    write_image(tmp_path / ".hidden" / "three.png")
    listing = list_sources(str(tmp_path))
    assert [(source.file, source.media, source.caption) for source in listing.sources] == [
        ("b/two.png", "image", "second"),
        ("one.mp4", "video", "first ünï"),
    ]
    assert listing.rejected == []


def test_missing_empty_and_binary_captions_say_so(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.png")
    (tmp_path / "b.txt").write_text(" \n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    problems = [source.caption_problem for source in list_sources(str(tmp_path)).sources]
    assert problems == [
        "no caption: a.txt is missing",
        "no caption: b.txt is empty",
        "no caption: c.txt is not UTF-8 text",
    ]


@pytest.mark.parametrize("as_folder", [True, False])
def test_manifest_rows_are_relative_to_it_and_extra_fields_ignored(tmp_path, as_folder):
    write_image(tmp_path / "x.png")
    write_image(tmp_path / "sub" / "y.png")
    manifest = write_manifest(
        tmp_path,
        [
            {"file": "x.png", "caption": " an x ", "seed": 3},
            {"file": "./sub/y.png", "caption": None},
        ],
    )
    listing = list_sources(str(tmp_path if as_folder else manifest))
    assert [(s.file, s.caption, s.caption_problem) for s in listing.sources] == [
        ("sub/y.png", "", "no caption: manifest.jsonl:2 has none"),
        ("x.png", "an x", ""),
    ]
    assert listing.sources[0].path == tmp_path / "sub" / "y.png"


def test_bad_manifest_lines_are_rejected_by_number(tmp_path):
    write_manifest(
        tmp_path,
        [
            {"file": "a.png", "caption": "a"},
            "{oops\n",
            "\n",
            {"caption": "no file"},
            "[1]\n",
            {"file": "notes.pdf", "caption": "c"},
            {"file": "a.png", "caption": "again"},
        ],
    )
    listing = list_sources(str(tmp_path))
    assert [source.caption for source in listing.sources] == ["a"]
    assert [row.file for row in listing.rejected] == [
        f"manifest.jsonl:{n}" for n in (2, 4, 5, 6, 7)
    ]
    assert {row.reason for row in listing.rejected} == {Reason.manifest}
    details = [row.detail for row in listing.rejected]
    assert details[0].startswith("the line is not JSON")
    assert details[1] == details[2] == "the line has no field 'file' with a path"
    assert "'.pdf' is neither a video nor an image" in details[3]
    assert details[4] == "a.png is listed twice; this line is ignored"


@pytest.mark.parametrize(
    ("source", "message"),
    [("", "data.source is empty"), ("no/such/folder", "does not exist")],
)
def test_missing_source_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        list_sources(source)


def test_folder_without_media_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("only text")
    with pytest.raises(ValueError, match=r"holds no clips or images; put manifest\.jsonl there"):
        list_sources(str(tmp_path))


def test_rows_carry_concept_repeat_and_all_renderings_of_a_structured_caption(tmp_path):
    fields = {"short": "a dog", "style": "film", "atmosphere": None, "dense": "It runs."}
    write_manifest(
        tmp_path,
        [
            {"file": "a.mp4", "caption": fields, "concept": " dogs ", "repeat": 3},
            {"file": "b.mp4", "caption": "a bee", "concept": None},
        ],
    )
    first, second = list_sources(str(tmp_path), caption_variants=4, field_drop=0.2).sources
    assert first.caption == first.captions[0] == "a dog. film. It runs."
    assert first.captions == render_captions(
        {"short": "a dog", "style": "film", "dense": "It runs."}, "a.mp4", 4, 0.2
    )
    assert len(first.captions) > 1
    assert (first.concept, first.repeat) == ("dogs", 3)
    assert (second.captions, second.concept, second.repeat) == (("a bee",), "", 1)


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"repeat": 0}, "field 'repeat' is 0; write a whole number of at least 1"),
        ({"repeat": -2}, "field 'repeat' is -2; write a whole number of at least 1"),
        ({"repeat": 1.5}, "field 'repeat' is 1.5; write a whole number of at least 1"),
        ({"repeat": True}, "field 'repeat' is true; write a whole number of at least 1"),
        ({"repeat": "2"}, "field 'repeat' is \"2\"; write a whole number of at least 1"),
        ({"concept": 7}, "field 'concept' is 7; write a text"),
        ({"concept": 0}, "field 'concept' is 0; write a text"),
        ({"caption": 7}, "field 'caption' is 7; write a text, or an object of texts"),
        (
            {"caption": ["a rather long", "list of captions", "for one clip"]},
            'field \'caption\' is ["a rather long", "list of captions", "f...; '
            "write a text, or an object of texts",
        ),
        (
            {"caption": {"short": "a dog", "style": 3}},
            "field 'style' of its caption is 3; write a text",
        ),
    ],
)
def test_fields_of_the_wrong_kind_reject_the_line(tmp_path, row, detail):
    write_manifest(tmp_path, [{"file": "a.mp4", "caption": "a dog", **row}, {"file": "b.mp4"}])
    listing = list_sources(str(tmp_path))
    assert [source.file for source in listing.sources] == ["b.mp4"]
    assert [(row.file, row.reason, row.detail) for row in listing.rejected] == [
        ("manifest.jsonl:1", Reason.manifest, f"a.mp4: {detail}")
    ]


def test_caption_file_may_have_the_clips_full_name_but_two_are_reported(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / f"{name}.txt").write_text(f"caption of {name}")
    (tmp_path / "b.txt").write_text("caption of b.mp4")
    first, second = list_sources(str(tmp_path)).sources
    assert first.captions == ("caption of a.mp4",)
    assert second.captions == ()
    assert second.caption_problem == "two captions: b.txt and b.mp4.txt; keep one of them"
