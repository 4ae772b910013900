"""The digest of weight files: it changes with their content, and not with their place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcache.connectors import weights
from kvcache.connectors.weights import UnknownWeightsError, identify, weight_files

LARGE = 3 << 20  # bytes of a tensor that is read in part


def write_safetensors(path: Path, sizes: list[int]) -> list[int]:
    """Write a file with a tensor of each size; return the offset of each, and of the end."""
    header, at = {}, 0
    for number, size in enumerate(sizes):
        header[f"layer.{number}"] = {
            "dtype": "U8", "shape": [size], "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    starts = [8 + len(text)]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts


def change(path: Path, at: int) -> None:
    """Change the byte at ``at``; size and times stay."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"!")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("tensor", [0, 1, 2])
@pytest.mark.parametrize("where", ["first", "last"])
def test_identify_safetensors_sees_both_ends_of_every_tensor(
    tmp_path: Path, tensor: int, where: str
) -> None:
    path = tmp_path / "model.safetensors"
    starts = write_safetensors(path, [LARGE, 1000, LARGE])
    before = identify(tmp_path)
    change(path, starts[tensor] if where == "first" else starts[tensor + 1] - 1)
    assert identify(tmp_path) != before


def test_identify_safetensors_sees_every_byte_of_a_small_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    starts = write_safetensors(path, [LARGE, weights.WHOLE_NBYTES])
    before = identify(tmp_path)
    change(path, starts[1] + weights.WHOLE_NBYTES // 2 + 1)
    assert identify(tmp_path) != before


def test_identify_safetensors_sees_the_header(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", [LARGE, 1000])
    before = identify(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", [1000, LARGE])
    assert identify(tmp_path) != before


def test_identify_fine_tuned_weights_differ(tmp_path: Path) -> None:
    """Training changes every number a little; sizes and names stay."""
    import torch
    from safetensors.torch import save_file

    model = {f"layer.{n}": torch.randn(512, 512) for n in range(4)}
    save_file(model, tmp_path / "model.safetensors")
    before = identify(tmp_path)
    save_file(model, tmp_path / "model.safetensors")
    assert identify(tmp_path) == before
    save_file(model | {"layer.2": model["layer.2"] * 1.001}, tmp_path / "model.safetensors")
    assert identify(tmp_path) != before


def test_identify_torch_archive_sees_every_byte(tmp_path: Path) -> None:
    import torch

    model = torch.zeros(3 << 20)
    torch.save({"weight": model}, tmp_path / "pytorch_model.bin")
    before = identify(tmp_path)
    model[1_234_567] = 1.0
    torch.save({"weight": model}, tmp_path / "pytorch_model.bin")
    assert identify(tmp_path) != before


@pytest.mark.parametrize("at", [0, 4 << 20, (13 << 20) - 1])
def test_identify_file_of_unknown_structure_sees_its_pages(tmp_path: Path, at: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(13 << 20))
    before = identify(path)
    spots = [begin for begin, _ in weights.sampled_pieces(0, 13 << 20, 3)]
    change(path, min(spots, key=lambda spot: abs(spot - at)))
    assert identify(path) != before


def test_identify_file_of_another_length_differs(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(5 << 20))
    before = identify(path)
    path.write_bytes(bytes((5 << 20) + 1))
    assert identify(path) != before


@pytest.mark.parametrize("name", ["hf_quant_config.json", "modeling.py", "sub/model.safetensors"])
def test_identify_with_another_file_beside_the_weights_differs(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    before = identify(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"{}")
    assert identify(tmp_path) != before


def test_identify_equal_files_at_other_paths_is_equal(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_safetensors(source / "model.safetensors", [LARGE, 1000])
    shutil.copytree(source, tmp_path / "mount" / "model")
    links = tmp_path / "links"
    links.mkdir()
    (links / "model.safetensors").symlink_to(source / "model.safetensors")
    os.utime(source / "model.safetensors", (1, 1))
    found = {identify(place) for place in (source, tmp_path / "mount" / "model", links)}
    assert len(found) == 1


def test_weight_files_leave_out_what_changes_no_block(tmp_path: Path) -> None:
    for name in ("model.bin", "tokenizer.json", "optimizer.pt", "README.md", ".hidden.bin"):
        (tmp_path / name).write_bytes(b"x")
    assert set(weight_files(tmp_path)) == {"model.bin"}
    (tmp_path / "tokenizer.safetensors").write_bytes(b"x")  # vLLM reads it
    assert set(weight_files(tmp_path)) == {"model.bin", "tokenizer.safetensors"}


def test_identify_folder_named_like_a_snapshot_is_no_commit(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / (40 * "a")
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(b"weights")
    before = identify(folder)
    assert before.startswith("digest ")
    (folder / "model.bin").write_bytes(b"trained")
    assert identify(folder) != before


def now_ns(folder: Path) -> int:
    """Return the file system's time once it is later than the last change: its clock is coarse."""
    mark = folder / "mark"
    before = max(path.lstat().st_ctime_ns for path in folder.rglob("*"))
    while True:
        mark.write_text("")
        os.utime(mark)
        if (now := mark.stat().st_ctime_ns) > before:
            return now


def _replaced(model: Path) -> None:
    (model.parent / "new").write_bytes(b"trained")
    (model.parent / "new").rename(model / "model.bin")


def _overwritten(model: Path) -> None:
    (model / "model.bin").write_bytes(b"trained")


def _touched_back(model: Path) -> None:
    (model / "model.bin").write_bytes(b"trained")
    os.utime(model / "model.bin", (1, 1))


def _moved(model: Path) -> None:
    model.rename(model.parent / "old")
    (model.parent / "other").rename(model)


def _linked_elsewhere(model: Path) -> None:
    model.rename(model.parent / "old")
    model.symlink_to(model.parent / "other")


def _moved_and_marked(model: Path) -> None:
    _moved(model)
    (model / "COMPLETE").touch()


@pytest.mark.parametrize(
    "change",
    [_replaced, _overwritten, _touched_back, _moved, _linked_elsewhere, _moved_and_marked],
)
def test_identify_weights_that_changed_since_are_unknown(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(name.encode())
    since = now_ns(tmp_path)
    assert identify(tmp_path / "model", since).startswith("digest ")
    (tmp_path / "model" / "notes.txt").write_text("of no matter")
    assert identify(tmp_path / "model", since).startswith("digest ")
    while now_ns(tmp_path) == since:
        pass
    change(tmp_path / "model")
    with pytest.raises(UnknownWeightsError, match="changed"):
        identify(tmp_path / "model", since)


@pytest.mark.parametrize("through", ["folder", "file"])
def test_identify_weights_behind_a_link_that_changed_since_are_unknown(
    tmp_path: Path, through: str
) -> None:
    """As when a release is switched: the link to the latest one is itself behind a link."""
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.bin").write_bytes(name.encode())
    (tmp_path / "latest").symlink_to("v1")
    model = tmp_path / "model"
    if through == "folder":
        model.symlink_to("latest")
    else:
        model.mkdir()
        (model / "model.bin").symlink_to("../latest/model.bin")
    since = now_ns(tmp_path)
    assert identify(model, since).startswith("digest ")
    while now_ns(tmp_path) == since:
        pass
    (tmp_path / "new").symlink_to("v2")
    (tmp_path / "new").rename(tmp_path / "latest")
    with pytest.raises(UnknownWeightsError, match="changed"):
        identify(model, since)


def test_identify_weights_behind_a_loop_of_links_are_unknown(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to("model")
    with pytest.raises(UnknownWeightsError):
        identify(tmp_path / "model", 0)


@pytest.mark.parametrize("name", ["modeling.py", "model.safetensors.index.json"])
def test_identify_sees_every_byte_of_large_settings_and_code(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    (tmp_path / name).write_bytes(bytes(10 * weights.WHOLE_NBYTES))
    before = identify(tmp_path)
    change(tmp_path / name, 5000)
    assert identify(tmp_path) != before


def _empty(path: Path) -> None:
    path.mkdir()


def _broken(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"\xff" * 100_000)


def _beyond(path: Path) -> None:
    path.mkdir()
    header = b'{"a": {"data_offsets": [0, 1000000]}}'
    body = len(header).to_bytes(8, "little") + header + bytes(100_000)
    (path / "model.safetensors").write_bytes(body)


@pytest.mark.parametrize("make", [_empty, _broken, _beyond])
def test_identify_folder_without_valid_weights_is_unknown(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "model")
    with pytest.raises(UnknownWeightsError):
        identify(tmp_path / "model")
