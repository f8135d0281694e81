"""Characters rendered from fonts: what is drawn, what is dropped, how families are split, and the cache.

The fonts are matplotlib's, and changed copies of them that are made here.
"""

import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from distill_jax import data
from distill_jax.data import _glyphs

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SMALL = ("cmr10", "cmss10", "cmtt10", "STIXGeneral", "STIXGeneralBol")
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with a cache of its own and no fonts in the system."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_glyphs, "system_folders", lambda: [tmp_path / "no-fonts"])


def folder(place, names=SMALL):
    place.mkdir(parents=True)
    for name in names:
        shutil.copy(FONTS / f"{name}.ttf", place)
    return place


def changed(place, name, family, change=lambda font: None):
    """Saves a changed copy of a font as one of another family."""
    with TTFont(FONTS / f"{name}.ttf") as font:
        for record in font["name"].names:
            if record.nameID in (1, 16):
                record.string = family
        change(font)
        font.save(place / f"{family.replace(' ', '')}.ttf")


def recode(new):
    """Gives characters the glyphs of others."""

    def change(font):
        for table in font["cmap"].tables:
            old = dict(table.cmap)
            table.cmap.update({ord(a): old[ord(b)] for a, b in new.items() if ord(b) in old})

    return change


def stretch(font):
    for glyph in font["glyf"].glyphs.values():
        glyph.expand(font["glyf"])
        if getattr(glyph, "coordinates", None):
            glyph.coordinates.scale((1.03, 1))
            glyph.recalcBounds(font["glyf"])


def lacking(character):
    def change(font):
        for table in font["cmap"].tables:
            table.cmap.pop(ord(character), None)

    return change


def blank(character):
    def change(font):
        name = font.getBestCmap()[ord(character)]
        font["glyf"][name] = font["glyf"][font.getBestCmap()[ord(" ")]]

    return change


def group_of(dataset, split):
    return {
        dataset.origins.group_names[i] for i in dataset.origins.group[np.unique(dataset.origins.of[split.id])]
    }


def picture(dataset, face, character):
    """The picture of a character, in whatever split it is."""
    number = dataset.origins.names.index(face)
    for split in (dataset.train, dataset.validation, dataset.test):
        chosen = (dataset.origins.of[split.id] == number) & (split.label == CHARACTERS.index(character))
        if chosen.any():
            assert chosen.sum() == 1
            return split.image[chosen][0, ..., 0]
    raise AssertionError(face)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A cache that all tests share."""
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="module")
def shipped(kept):
    return data.load("glyphs", data_dir=FONTS, cache_dir=kept)


def test_what_matplotlib_ships_is_a_smoke_test(shipped):
    assert (shipped.name, shipped.classes, shipped.class_names) == ("glyphs", 62, tuple(CHARACTERS))
    assert shipped.source.startswith(f"22 faces of 8 groups of families, from {FONTS}; 18 were dropped")
    assert shipped.source.endswith("8 groups are a smoke test, not a benchmark")
    origins, splits = shipped.origins, shipped[2:5]
    assert [x.dtype for x in shipped.train] == [np.int64, np.uint8, np.int32]
    assert shipped.train.image.shape[1:] == (32, 32, 1)
    ids = np.concatenate([split.id for split in splits])
    np.testing.assert_array_equal(np.sort(ids), np.arange(22 * 62))
    label = np.concatenate([split.label for split in splits])
    assert len(set(zip(origins.of[ids].tolist(), label.tolist(), strict=True))) == len(ids)
    groups = [group_of(shipped, split) for split in splits]
    assert set.union(*groups) == set(origins.group_names)
    assert sum(map(len, groups)) == len(origins.group_names) == 8
    assert {"dejavu", "stixgeneral", "cmr10"} < set(origins.group_names)
    assert len(origins.dropped) == 18
    assert "cmex10" in " ".join(origins.dropped)


def test_characters_stand_as_in_print(shipped):
    """Capital letters are 18 pixels high, all characters of a face share scale and base line."""

    def rows(character, face="DejaVu Sans Book (DejaVuSans.ttf)"):
        ink = np.flatnonzero((picture(shipped, face, character) > 100).any(1))
        return ink[0], ink[-1] + 1

    assert rows("H") == rows("E") == (5, 23)
    assert rows("x")[1] == 23
    assert rows("x")[0] >= 9  # o and O, x and X differ by their size
    assert rows("p")[1] > 25
    top, bottom = rows("O")
    assert top in (4, 5)
    assert bottom in (23, 24)
    for face in shipped.origins.names:
        ink = np.flatnonzero((picture(shipped, face, "H") > 100).any(0))
        assert abs(ink[0] + ink[-1] - 31) <= 1  # centred


def test_bad_faces_are_dropped_with_a_reason(tmp_path):
    fonts = folder(tmp_path / "fonts")
    capitals = dict(zip(string.ascii_lowercase, string.ascii_uppercase, strict=True))
    changed(fonts, "cmr10", "Unicase", recode(capitals))
    changed(fonts, "cmr10", "Lacking", lacking("7"))
    changed(fonts, "cmr10", "Blank", blank("Q"))
    changed(fonts, "cmr10", "Repeated", recode({"3": "8"}))
    changed(fonts, "cmr10", "zz Twin")
    letters = string.ascii_letters
    changed(
        fonts,
        "DejaVuSansMono-Bold",
        "Cipher",
        recode(dict(zip(letters, letters[7:] + letters[:7], strict=True))),
    )
    (fonts / "damaged.ttf").write_bytes((FONTS / "cmr10.ttf").read_bytes()[:3000])
    (fonts / "page.otf").write_text("<html>no font</html>")
    (fonts / "empty.ttc").write_bytes(b"")
    (fonts / "readme.txt").write_text("not looked at")
    dataset = data.load("glyphs", data_dir=fonts, cache_dir=tmp_path / "kept")
    reasons = {line.partition(": ")[0]: line.partition(": ")[2] for line in dataset.origins.dropped}
    expected = {
        "Unicase Regular (Unicase.ttf)": "unicase, its small letters look like capital letters",
        "Lacking Regular (Lacking.ttf)": "symbol or incomplete, it has no 7",
        "Blank Regular (Blank.ttf)": "blank, Q has no picture",
        "Repeated Regular (Repeated.ttf)": "symbol or incomplete, 3 and 8 have the same picture",
        "zz Twin Regular (zzTwin.ttf)": "duplicate, the same pictures as cmr10 Regular (cmr10.ttf)",
        "Cipher Bold (Cipher.ttf)": "symbol or hardly readable, only",
        "damaged.ttf": "it cannot be read, OSError: ",
        "page.otf": "it cannot be read, OSError: ",
        "empty.ttc": "it cannot be read, OSError: ",
    }
    assert reasons.keys() == expected.keys()
    for face, reason in expected.items():
        assert reasons[face].startswith(reason), (face, reasons[face])
    assert sorted(dataset.origins.group_names) == ["cmr10", "cmss10", "cmtt10", "stixgeneral"]
    (listed,) = (tmp_path / "kept").glob("glyphs-*.dropped.txt")
    assert listed.read_text().splitlines() == list(dataset.origins.dropped)
    assert f"9 were dropped, listed in {listed}" in dataset.source


def test_families_of_one_name_and_near_copies_are_one_group(tmp_path):
    fonts = folder(tmp_path / "fonts")
    changed(fonts, "cmtt10", "cmr10 Mono")
    changed(fonts, "STIXGeneral", "Another Roman", stretch)
    origins = data.load("glyphs", data_dir=fonts).origins
    assert not [line for line in origins.dropped if "Another" in line]
    groups = {
        name.partition(" ")[0]: origins.group_names[g]
        for name, g in zip(origins.names, origins.group, strict=True)
    }
    assert groups["Another"] == groups["STIXGeneral"] == "another"
    assert {g for n, g in zip(origins.names, origins.group, strict=True) if n.startswith("cmr10")} == {
        origins.group_names.index("cmr10")
    }


def test_families_are_linked_through_faces_that_are_dropped(tmp_path):
    fonts = folder(tmp_path / "fonts")
    changed(fonts, "cmr10", "zz Roman")
    changed(fonts, "cmss10", "zz Sans")
    origins = data.load("glyphs", data_dir=fonts).origins
    assert len([line for line in origins.dropped if line.startswith("zz")]) == 2
    assert sorted(origins.group_names) == ["cmr10", "cmtt10", "stixgeneral"]


def test_the_order_of_files_does_not_matter(tmp_path, monkeypatch):
    fonts = folder(tmp_path / "fonts")
    first = data.load("glyphs", data_dir=fonts)
    again = tmp_path / "elsewhere" / "zz"
    again.mkdir(parents=True)
    for name in sorted(SMALL, reverse=True):
        shutil.copy(FONTS / f"{name}.ttf", again if name.startswith("c") else again.parent)
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda f: [(r, d, n[::-1]) for r, d, n in [*walk(f)][::-1]])
    second = data.load("glyphs", data_dir=again.parent)
    for a, b in zip(first[2:5], second[2:5], strict=True):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert first.origins.names == second.origins.names


def test_other_fonts_move_no_family_to_another_split(tmp_path, shipped):
    usable = [name.partition("(")[2][:-5] for name in shipped.origins.names]
    for gone in ("cmb10", "cmss10"):
        fewer = data.load("glyphs", data_dir=folder(tmp_path / gone, [n for n in usable if n != gone]))
        assert group_of(fewer, fewer.test) == group_of(shipped, shipped.test) - {gone}


def test_another_font_moves_only_the_group_that_it_joins(tmp_path):
    fonts = folder(tmp_path / "fonts")
    before = data.load("glyphs", data_dir=fonts)
    assert group_of(before, before.test) == {"cmtt10", "stixgeneral"}
    changed(fonts, "STIXGeneral", "Stixus Roman", stretch)  # joins the group, later in the alphabet
    after = data.load("glyphs", data_dir=fonts)
    assert group_of(after, after.test) == {"cmtt10", "stixgeneral"}
    changed(fonts, "STIXGeneral", "Another Roman", stretch)  # gives it a new name, and so another hash
    after = data.load("glyphs", data_dir=fonts)
    assert "another" in after.origins.group_names
    assert not group_of(after, after.test) & {"another", "stixgeneral"}


def test_validation_takes_whole_groups(shipped, kept):
    seen = set()
    for seed in range(4):
        dataset = data.load("glyphs", data_dir=FONTS, validation=63, seed=seed, cache_dir=kept)
        assert len(dataset.validation.id) >= 63
        assert not group_of(dataset, dataset.validation) & group_of(dataset, dataset.train)
        for a, b in zip(dataset.test, shipped.test, strict=True):
            np.testing.assert_array_equal(a, b)
        seen |= group_of(dataset, dataset.validation)
    assert len(seen) > 1
    most = len(dataset.validation.id) + len(dataset.train.id) - 1
    left = data.load("glyphs", data_dir=FONTS, validation=most, cache_dir=kept)
    assert len(group_of(left, left.train)) == 1
    with pytest.raises(ValueError, match=f"validation must be from 1 to {most} of the"):
        data.load("glyphs", data_dir=FONTS, validation=most + 1, cache_dir=kept)


def test_rendered_once_until_the_fonts_change(tmp_path, monkeypatch):
    fonts, calls, render = folder(tmp_path / "fonts"), [], _glyphs.render
    monkeypatch.setattr(_glyphs, "render", lambda *a: calls.append(a) or render(*a))

    def load(**options):
        return data.load("glyphs", data_dir=fonts, cache_dir=tmp_path / "c", **options)

    first = load()
    load(seed=3)
    assert len(calls) == 1
    (kept,) = (tmp_path / "c").glob("glyphs-*.npz")
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1  # a flipped bit is noticed
    kept.write_bytes(content)
    np.testing.assert_array_equal(load().train.image, first.train.image)
    assert len(calls) == 2
    shutil.copy(FONTS / "cmb10.ttf", fonts)
    assert len(load().origins.names) == 6
    small = load(size=16)
    assert small.train.image.shape[1:] == (16, 16, 1)
    assert len(calls) == 4


def test_the_systems_fonts_come_first_and_matplotlibs_last(tmp_path, monkeypatch):
    monkeypatch.setattr(_glyphs, "system_folders", lambda: [folder(tmp_path / "fonts")])
    assert "from the system's fonts; 0 were dropped" in data.load("glyphs").source
    monkeypatch.setattr(_glyphs, "system_folders", lambda: [tmp_path / "none"])
    monkeypatch.setattr(_glyphs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(data.DataError, match=r"the system's fonts: expected font files .* Install fonts"):
        data.load("glyphs")


def test_without_fonts_in_the_system_matplotlibs_are_used():
    source = data.load("glyphs").source
    assert source.startswith("22 faces of 8 groups of families, from matplotlib's fonts;")
    assert "a smoke test, not a benchmark (the system's fonts: expected font files (.ttf" in source


def test_the_folders_of_the_system_are_absolute(monkeypatch):
    monkeypatch.undo()
    for platform in ("linux", "darwin", "win32"):
        monkeypatch.setattr(sys, "platform", platform)
        folders = _glyphs.system_folders()
        assert folders
        assert all(path.is_absolute() or platform == "win32" for path in folders)


def test_errors_are_one_line(tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(data.DataError, match=r"empty: expected font files .*, found none in") as error:
        data.load("glyphs", data_dir=empty)
    assert "\n" not in str(error.value)
    two = folder(tmp_path / "two", ("cmr10", "cmss10", "cmex10"))
    with pytest.raises(data.DataError, match=r"at least 3 groups .*, found 2 in 3 files; dropped: cmex10"):
        data.load("glyphs", data_dir=two)
    (empty / "broken.ttf").write_text("x")
    with pytest.raises(data.DataError, match=r"found 0 in 1 files; dropped: broken.ttf: it cannot be read"):
        data.load("glyphs", data_dir=empty)
    with pytest.raises(ValueError, match="data_dir must be an existing folder"):
        data.load("glyphs", data_dir=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="size must be an integer of at least 8, got 4"):
        data.load("glyphs", data_dir=two, size=4)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"rendered with Pillow: pip install 'distill_jax\[data\]'"):
        data.load("glyphs", data_dir=two)


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="decoded data is not kept"):
        dataset = data.load("glyphs", data_dir=folder(tmp_path / "fonts"), cache_dir=tmp_path / "file")
    assert "listed in" not in dataset.source


def test_other_images_are_centred_in_a_larger_size():
    plain, padded = data.load("digits"), data.load("digits", size=11)
    assert padded.train.image.shape == (1081, 11, 11, 1)
    np.testing.assert_array_equal(padded.test.image[:, 1:9, 1:9], plain.test.image)
    assert padded.test.image.sum() == plain.test.image.sum()
    assert data.load("digits", size=8).train.image.shape == plain.train.image.shape


def test_images_are_not_cut_off(tmp_path):
    arrays = {f"{k}_{s}": np.zeros((6, 12, 9), np.uint8) for k in "x" for s in ("train", "test")}
    arrays |= {f"y_{s}": np.arange(6) % 2 for s in ("train", "test")}
    np.savez(tmp_path / "own.npz", **arrays)
    assert data.load(tmp_path / "own.npz", size=12).train.image.shape == (5, 12, 12, 1)
    with pytest.raises(ValueError, match="size must be at least that of own's images, 12×9, got 10"):
        data.load(tmp_path / "own.npz", size=10)


def test_pictures_are_whole_and_not_all_alike(shipped):
    image = shipped.train.image[..., 0]
    assert (image.max((1, 2)) > 200).all()
    edge = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    assert edge.max() < 100  # nothing is cut off
    assert Image.fromarray(image[0]).getbbox() is not None


def test_the_programs_of_the_guide_run(capsys):
    page = Path(__file__).parents[1] / "docs" / "guides" / "characters.md"
    programs = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile("\n".join(programs), page.name, "exec"), {})
    out = capsys.readouterr().out
    assert "a smoke test, not a benchmark" in out
    assert "124 labelled examples" in out  # two faces
    assert "(64, 62)" in out


def test_the_list_of_packages(monkeypatch, capsys):
    """The command names them; where apt does not know one, it is left out, or the program stops."""
    from data import fonts

    monkeypatch.setattr(sys, "argv", ["fonts.py"])
    monkeypatch.setattr(fonts.shutil, "which", lambda name: None)
    fonts.main()
    command = capsys.readouterr().out.split()
    assert command[:4] == ["apt-get", "install", "--yes", "--no-install-recommends"]
    assert len(set(command[4:])) == len(fonts.PACKAGES.split()) == 179
    assert all(name.startswith("fonts-") for name in command[4:])

    monkeypatch.setattr(fonts.shutil, "which", lambda name: name)
    monkeypatch.setattr(fonts, "known", lambda packages: packages[:2])
    fonts.main()
    printed = capsys.readouterr()
    assert printed.out.split()[4:] == command[4:6]
    assert "not in this release" in printed.err
    assert command[6] in printed.err
    monkeypatch.setattr(fonts, "known", lambda packages: [])
    with pytest.raises(SystemExit, match="error: apt knows none of the packages: run apt-get update first"):
        fonts.main()

    monkeypatch.setattr(sys, "argv", ["fonts.py", "--install"])
    monkeypatch.setattr(fonts, "known", lambda packages: packages)
    ran = []
    done = subprocess.CompletedProcess([], 100)
    monkeypatch.setattr(fonts.subprocess, "run", lambda command, **k: ran.append(command) or done)
    with pytest.raises(SystemExit, match="error: apt-get ended with status 100: it needs root"):
        fonts.main()
    assert ran == [command]
    monkeypatch.setattr(fonts.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="error: --install needs apt-get"):
        fonts.main()
