"""The JSON schema of summary.json. ``python -m vlm_unlearn.reporting.schema > docs/summary.schema.json`` writes the published file."""

from __future__ import annotations

import json
import sys
from typing import Any

from vlm_unlearn.records import Summary


def summary_schema() -> dict[str, Any]:
    """What a reader of summary.json may rely on (JSON Schema 2020-12), out of the records that write it."""
    version = Summary.model_fields["schema_version"].default
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:vlm-unlearn:summary:{version}"}
    return head | Summary.model_json_schema(by_alias=True)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(summary_schema(), indent=2, ensure_ascii=False) + "\n")
