"""Makes `tests/data/kuberay_schemas.json` from KubeRay's own definitions of its kinds of resources.

    python -m tests.unit.cluster.kuberay_schemas KUBERAY/ray-operator/config/crd/bases > tests/data/kuberay_schemas.json

The descriptions are left out. A part that stands in several places, as a pod's template does, is written once.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

KINDS = ("RayCluster", "RayJob")
VERSION = "v1"  # of the interface
SHARED_LENGTH = 200  # characters of a part that is worth a name


def plain(node: Any, names: bool = False) -> Any:
    """A schema without descriptions. `names`: the keys of this object are names of properties."""
    if isinstance(node, list):
        return [plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {key: plain(value, key == "properties") for key, value in node.items() if names or key != "description"}


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas with a definition for each part that stands in several places."""
    seen: Counter[str] = Counter()

    def count(node: Any) -> None:
        if isinstance(node, dict | list):
            text = json.dumps(node, sort_keys=True)
            if isinstance(node, dict) and "type" in node and len(text) > SHARED_LENGTH:
                seen[text] += 1
                if seen[text] > 1:
                    return
            for each in node.values() if isinstance(node, dict) else node:
                count(each)

    count(schemas)
    names = {text: f"part{number}" for number, text in enumerate(text for text, times in seen.items() if times > 1)}
    parts: dict[str, Any] = {}

    def written(node: Any) -> Any:
        if isinstance(node, list):
            return [written(each) for each in node]
        if not isinstance(node, dict):
            return node
        name = names.get(json.dumps(node, sort_keys=True))
        if name is None:
            return {key: written(value) for key, value in node.items()}
        if name not in parts:
            parts[name] = {}
            parts[name] = {key: written(value) for key, value in node.items()}
        return {"$ref": f"#/$defs/{name}"}

    return {"schemas": {kind: written(schema) for kind, schema in schemas.items()}, "$defs": parts}


def main() -> None:
    schemas: dict[str, Any] = {}
    for kind in KINDS:
        text = (Path(sys.argv[1]) / f"ray.io_{kind.lower()}s.yaml").read_text()
        (found,) = (each for each in yaml.safe_load(text)["spec"]["versions"] if each["name"] == VERSION)
        schemas[kind] = plain(found["schema"]["openAPIV3Schema"])
    json.dump(shared(schemas), sys.stdout, separators=(",", ":"), sort_keys=True)
    print()


if __name__ == "__main__":
    main()
