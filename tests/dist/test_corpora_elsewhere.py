"""`elastic-moe prepare` of corpora that lie elsewhere: the shards are those of the same files on a disk.

S3 is moto's server behind a proxy that fails, Google's store an emulator; the Hugging Face hub is a mock.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs as pafs

from elastic_moe.checkpoint.storage import open_filesystem
from elastic_moe.environment import environment
from tests.corpora import serving
from tests.gcs_server import BUCKET as GCS_BUCKET
from tests.gcs_server import gcs_server
from tests.hub_server import NAME, hub_of
from tests.s3_server import BUCKET, READS, Fault, Proxy

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "elastic_moe" / "DESIGN.md"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with a file of each kind that is read in its own way."""
    root = tmp_path_factory.mktemp("corpus")
    text = TEXT.read_text()
    documents = text.split("\n\n")
    (root / "a.txt").write_text(text * 8)  # in several parts
    (root / "sub").mkdir()
    (root / "sub" / "b.jsonl.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": d}) for d in documents).encode())
    )
    pq.write_table(pa.table({"text": documents}), root / "c.parquet", row_group_size=50)
    return root


def prepare(corpus: str, cache: Path, **variables: str) -> tuple[int, str]:
    """Exit code of the command, and what it said on stderr."""
    words = [f"data.corpus={corpus}", "data.tokenizer=bytes", f"data.cache_dir={cache}", "data.processes=2"]
    done = subprocess.run(
        [sys.executable, "-m", "elastic_moe.cli.main", "prepare", *words],
        env=os.environ | variables, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def shards(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.bin")}


@pytest.fixture(scope="module")
def expected(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The shards of the files on a disk."""
    cache = tmp_path_factory.mktemp("expected")
    code, said = prepare(str(files), cache)
    assert code == 0, said
    found = shards(cache)
    assert set(found) == {"train.bin", "val.bin"}
    return found


def upload(files: Path, url: str) -> None:
    filesystem, inner = open_filesystem(url)
    pafs.copy_files(str(files), inner, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)


def test_an_object_store_that_fails_on_the_way(
    files: Path, expected: dict[str, bytes], proxy: Proxy, tmp_path: Path
) -> None:
    url = f"s3://{BUCKET}/corpora/of/texts"
    upload(files, url)
    for kind, path in (("403", ""), ("cut download", r"a\.txt")):
        proxy.fault = Fault(kind, READS, path)
        code, said = prepare(url, tmp_path / "cache")
        assert code == 2, said
        assert said.splitlines()[-1].startswith("elastic_moe: "), said
        assert "Traceback" not in said
        assert not shards(tmp_path / "cache")
    proxy.fault = Fault()
    assert prepare(url, tmp_path / "cache")[0] == 0
    assert shards(tmp_path / "cache") == expected


def test_google_cloud_storage(files: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    url = f"gs://anonymous@{GCS_BUCKET}/corpora/of/texts"
    with gcs_server(tmp_path) as server, environment(server.variables):
        upload(files, url)
        code, said = prepare(url, tmp_path / "cache")
        assert code == 0, said
        assert shards(tmp_path / "cache") == expected
        code, said = prepare(url + "/none", tmp_path / "cache")
        assert code == 2
        assert "does not exist, or is empty" in said


@pytest.fixture
def hub(files: Path) -> Iterator[str]:
    with serving(hub_of(files)) as address:
        yield address


def test_a_dataset_of_a_hub(files: Path, expected: dict[str, bytes], hub: str, tmp_path: Path) -> None:
    for path in (NAME, f"{NAME}@main"):
        cache = tmp_path / path.partition("@")[2]
        code, said = prepare(f"hf://datasets/{path}", cache, HF_ENDPOINT=hub)
        assert code == 0, said
        assert shards(cache) == expected
    code, said = prepare("hf://datasets/nobody/nothing", tmp_path / "none", HF_ENDPOINT=hub)
    assert code == 2
    assert len(said.splitlines()) == 1, said


def test_a_file_of_a_hub_that_changes_while_it_is_read(hub: str, files: Path, tmp_path: Path) -> None:
    """A process that has listed the dataset is told when a file is another one."""
    program = (
        "import sys\n"
        "from elastic_moe.data.location import has_changed, list_url\n"
        f"(file,), _ = list_url('hf://datasets/{NAME}/sub')\n"
        "print(has_changed(file.path, file.size, file.version), flush=True)\n"
        "input()\n"
        "print(has_changed(file.path, file.size, file.version))\n"
    )
    file = files / "sub" / "b.jsonl.gz"
    before = file.read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"HF_ENDPOINT": hub}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        try:
            file.write_bytes(before[:-1] + b"x")
            assert process.communicate("\n", timeout=120)[0] == "True\n"
        finally:
            file.write_bytes(before)
