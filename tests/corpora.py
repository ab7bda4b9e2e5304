"""Corpora in tests: their settings, how they are read back, and servers that they come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec.asyn

from elastic_moe.config.schema import DataConfig
from elastic_moe.data import location
from elastic_moe.data.corpus import cut_into_parts, list_files
from elastic_moe.data.pieces import read_pieces
from elastic_moe.data.source_file import Part

fsspec.asyn.get_loop()  # its thread lasts as long as this process does


def config_of(corpus: Path | str, **changes: Any) -> DataConfig:
    values = {"corpus": str(corpus), "tokenizer": "bytes", "seq_len": 16, "val_fraction": 0.1}
    return DataConfig(**(values | changes))


def texts_of(corpus: Path | str, part_bytes: int = 0, **changes: Any) -> list[str]:
    """The documents of a corpus, read part by part."""
    config = config_of(corpus, **changes)
    documents = [""]
    for part in cut_into_parts(list_files(config).files, Part(0, ()), part_bytes):
        for piece in read_pieces(part.files, 0, 700, config.text_field):
            documents[-1] += piece.text
            if piece.ends:
                documents.append("")
    return documents[:-1]


@contextmanager
def serving(handler: Any, before_end: Callable[[], object] = lambda: None) -> Iterator[str]:
    """The address of an HTTP server with these answers, as long as the context lasts; no connection outlives it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        before_end()
        served.shutdown()
        thread.join()
    filesystem = location._server("http")  # keeps connections for later
    if filesystem._session is not None:
        filesystem.close_session(filesystem.loop, filesystem._session)
    location._server.cache_clear()
    filesystem.clear_instance_cache()
