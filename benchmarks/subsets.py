"""Small prepared sets for a bare machine, cut out of prepared TFDS sets.

    python -m benchmarks.subsets --data=DIR --out=runs/subsets

Reads DIR/cifar10 and DIR/mnist_t10k and writes the first records of each split, byte for byte, as prepared
sets of the same names: 24,000 + 3,000 images of CIFAR-10, 4,000 + 4,000 of MNIST, 27 MB. Copy the folder
to the machine and give it to `benchmarks.accelerator --data=`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

COUNTS = {"cifar10": {"train": 24_000, "test": 3_000}, "mnist_t10k": {"train": 4_000, "test": 4_000}}


def cut(source: Path, target: Path, counts: dict[str, int]) -> None:
    """Writes a prepared set with the first `counts` records of each split of another one.

    Args:
      source: folder of a version, in the array_record format.
      target: the new folder; must not exist.
      counts: records to take, by split; fewer where there are fewer.
    """
    from array_record.python import array_record_module as array_record  # ty: ignore[missing-module-member]

    target.mkdir(parents=True)
    info = json.loads((source / "dataset_info.json").read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] in counts]
    for split in info["splits"]:
        files = sorted(source.glob(f"*-{split['name']}.array_record-*"))
        records: list[bytes] = []
        for file in files:
            reader = array_record.ArrayRecordReader(str(file))
            wanted = min(counts[split["name"]] - len(records), reader.num_records())
            records += reader.read(list(range(wanted))) if wanted else []
            reader.close()
        name = re.sub(r"\d+-of-\d+$", "00000-of-00001", files[0].name)
        writer = array_record.ArrayRecordWriter(str(target / name), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        split["shardLengths"] = [str(len(records))]
        split["numBytes"] = str(sum(map(len, records)))
    (target / "dataset_info.json").write_text(json.dumps(info, indent=2))
    for path in source.iterdir():
        if path.name == "features.json" or path.suffix == ".txt":
            shutil.copyfile(path, target / path.name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/subsets"))
    args = parser.parse_args()
    for name, counts in COUNTS.items():
        (features,) = (args.data / name).glob("*/features.json")
        cut(features.parent, args.out / name / features.parent.name, counts)


if __name__ == "__main__":
    main()
