"""A conversion needs no more memory than a shard and some tensors, however large the checkpoint is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foreign_checkpoints import OriginalLlava, sentence_pieces, write_clip, write_llava, write_llava_lora

MB = 1 << 20
# Prints the peak memory of this process and of its largest child, in bytes, after each conversion.
PROGRAM = """
import json, resource, sys
from pathlib import Path
from vlm_unlearn.modeling.conversion.base import ConversionOptions
from vlm_unlearn.modeling.conversion.run import convert
for source, base, clip, out in json.loads(sys.argv[1]):
    convert(source, Path(out), ConversionOptions(base=base, vision_tower=clip))
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    print(json.dumps([resource.getrusage(kind).ru_maxrss * 1024 for kind in kinds]))
"""


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="measures memory in the units of Linux")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    small = OriginalLlava(len(sentence_pieces()))
    clip = write_clip(tmp_path / "clip", small)
    warm_up = [str(write_llava(tmp_path / "small", small)), None, str(clip), str(tmp_path / "out-small")]
    large = OriginalLlava(len(sentence_pieces()), width=512, layers=16)
    num_bytes = 4 * sum(tensor.numel() for tensor in large.original_tensors().values())
    base = write_llava(tmp_path / "large", large, shards=8)
    adapter = write_llava_lora(tmp_path / "adapter", large, large)
    runs = [warm_up, [str(adapter), str(base), str(clip), str(tmp_path / "out-large")]]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(runs)], stdout=subprocess.PIPE, text=True, check=True
    )
    small_peaks, large_peaks = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    growth = sum(large_peaks) - sum(small_peaks)
    largest_shard = max(file.stat().st_size for file in base.glob("*.bin"))
    assert num_bytes > 140 * MB
    assert growth < largest_shard + 30 * MB, f"{growth / MB:.0f} MB more for {num_bytes / MB:.0f} MB"
