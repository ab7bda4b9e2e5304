"""Two hundred malformed Hugging Face directories: each is read, or refused with one sentence that names it."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_moe.config.schema import ModelConfig
from elastic_moe.data.tokenizer import BpeTokenizer
from elastic_moe.errors import UserError
from elastic_moe.model.hf.checkpoint import INDEX, HFCheckpoint, write_checkpoint
from elastic_moe.model.hf.files import MAX_JSON
from elastic_moe.model.params import param_specs
from elastic_moe.saved import open_model

ROUNDS, SEED = 200, 0
SPARE_BYTES = 8 << 20
VALUES: list[Any] = [
    None, -1, 0, 1, 3, 2**31, 2**40, 2**70, 1.5, float("inf"), float("nan"), "", "x", "../x", "/etc/passwd", [], {},
    [[]], {"a": 1}, True, "F64", "I64", "\x00", "${oc.env:HOME}", "pytorch_model.bin", "9" * 5000,
]  # fmt: skip


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in several files, with a tokenizer."""
    where = tmp_path_factory.mktemp("origin") / "hf"
    cfg = ModelConfig(
        vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8, dense_hidden=16,
        num_experts=4, experts_per_token=2, expert_hidden=8,
    )  # fmt: skip
    write_checkpoint(where, cfg, lambda spec: torch.ones(spec.shape), 64, shard_bytes=10_000)
    BpeTokenizer.train(["some text"], 280).export(where)
    return where


def changed(value: Any, draw: random.Random) -> Any:
    """A copy of a JSON value with one place in it changed, removed or renamed."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(list(value))
        how = draw.random()
        if how < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if how < 0.25:
            return {("x" if k == key else k): v for k, v in value.items()}
        return {k: changed(v, draw) if k == key else v for k, v in value.items()}
    return draw.choice(VALUES)


def damage_bytes(data: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(data)), draw.randrange(1, 40)
    return draw.choice(
        [data[:at], data[:at] + bytes(length) + data[at + length :], data[:at] + data[at + length :], b"", b"\0" * 99,
         b"[" * 100_000, draw.randbytes(300), data + data]
    )  # fmt: skip


def damage_safetensors(data: bytes, draw: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if draw.random() < 0.2:
        return draw.choice([2**63, 10**9, len(data), 0, 1]).to_bytes(8, "little") + data[8:]
    header = json.dumps(changed(json.loads(data[8 : 8 + length]), draw)).encode()
    if draw.random() < 0.2:  # the same tensor twice
        text = data[8 : 8 + length].strip()
        header = text[:-1] + b"," + text[1:]
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def damage(directory: Path, draw: random.Random) -> str:
    """Damage one file of a directory. Returns what was done, for the message of a failure."""
    path = draw.choice(sorted(directory.iterdir()))
    how = draw.random()
    if how < 0.07:
        path.unlink()
    elif how < 0.12:
        path.unlink()
        path.mkdir()
    elif how < 0.3:
        path.write_bytes(damage_bytes(path.read_bytes(), draw))
    elif path.suffix == ".safetensors":
        if draw.random() < 0.1:
            path.write_bytes(draw.choice(sorted(directory.glob("*.safetensors"))).read_bytes())
        else:
            path.write_bytes(damage_safetensors(path.read_bytes(), draw))
    else:
        path.write_text(json.dumps(changed(json.loads(path.read_bytes()), draw)))
    return f"{path.name}, {how:.2f}"


def read(directory: Path) -> None:
    """Read all of a directory, as `generate` does."""
    model = open_model(str(directory))
    for spec in param_specs(model.cfg):
        assert model.read(spec).shape == spec.shape
    if model.tokenizer is not None:
        assert model.tokenizer.decode(model.tokenizer.encode("some text")) is not None


def test_malformed_directories(origin: Path, tmp_path: Path) -> None:
    malformed_directories(origin, tmp_path, ROUNDS, SEED)


def malformed_directories(origin: Path, tmp_path: Path, rounds: int, seed: int) -> None:
    """Damage a directory in so many ways, and read it each time."""
    read(origin)
    refused = 0
    for number in range(rounds):
        draw, directory = random.Random(f"{seed}.{number}"), tmp_path / f"{number}"
        shutil.copytree(origin, directory)
        done = damage(directory, draw)
        tracemalloc.start()
        sentence = ""
        try:
            read(directory)
        except UserError as error:
            sentence = str(error)
        except BaseException as error:
            raise AssertionError(f"seed {seed}, round {number}, {done}: {error!r}") from error
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        if sentence:
            refused += 1
            assert len(sentence.splitlines()) == 1, f"{number}: {sentence}"
            assert str(directory) in sentence, f"{number}: {sentence}"
        assert peak < SPARE_BYTES, f"round {number} ({done}) takes {peak} bytes"
        shutil.rmtree(directory)
    assert refused > rounds // 3


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "code ran")


@pytest.mark.parametrize("place", ["pytorch_model.bin", "model.safetensors", "config.json", "tokenizer.json", "index"])
def test_a_pickle_is_never_loaded(origin: Path, tmp_path: Path, place: str) -> None:
    directory, ran = tmp_path / "hf", tmp_path / "ran"
    shutil.copytree(origin, directory)
    trap = pickle.dumps(Trap(ran))
    if place == "index":
        index = json.loads((directory / INDEX).read_bytes())
        (directory / "pytorch_model.bin").write_bytes(trap)
        index["weight_map"] = dict.fromkeys(index["weight_map"], "pytorch_model.bin")
        (directory / INDEX).write_text(json.dumps(index))
    else:
        if place.startswith("pytorch"):
            for path in directory.glob("model*"):
                path.unlink()
        if place == "model.safetensors":
            (directory / INDEX).unlink()
        (directory / place).write_bytes(trap)
    with pytest.raises(UserError, match=str(directory)):
        read(directory)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors"])
def test_the_index_names_files_beside_it_only(origin: Path, tmp_path: Path, name: str) -> None:
    directory = tmp_path / "hf"
    shutil.copytree(origin, directory)
    index = json.loads((directory / INDEX).read_bytes())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is no safetensors file beside it"):
        read(directory)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00004.safetensors"])
def test_what_is_no_file_is_a_sentence(origin: Path, tmp_path: Path, name: str) -> None:
    """To open a pipe would wait for ever, and a device has no end."""
    for number, put in enumerate((os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"))):
        directory = tmp_path / str(number)
        shutil.copytree(origin, directory)
        (directory / name).unlink()
        put(directory / name)
        with pytest.raises(UserError, match=f"{name} is no file"):
            HFCheckpoint(directory, ModelConfig())


def test_a_list_of_files_without_an_end_is_a_sentence(origin: Path, tmp_path: Path) -> None:
    shutil.copytree(origin, tmp_path / "hf")
    os.truncate(tmp_path / "hf" / INDEX, MAX_JSON + 1)
    with pytest.raises(UserError, match="more than any such file"):
        open_model(str(tmp_path / "hf"))
