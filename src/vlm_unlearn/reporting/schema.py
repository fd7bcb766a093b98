"""The JSON schema of summary.json.

The command ``python -m vlm_unlearn.reporting.schema > docs/summary.schema.json`` writes the published file.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from vlm_unlearn.records import Summary


def summary_schema() -> dict[str, Any]:
    """Returns the JSON schema (2020-12) of summary.json, generated from the `Summary` record."""
    version = Summary.model_fields["schema_version"].default
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:vlm-unlearn:summary:{version}"}
    return head | Summary.model_json_schema(by_alias=True)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(summary_schema(), indent=2, ensure_ascii=False) + "\n")
