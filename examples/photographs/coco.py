#!/usr/bin/env python
"""Gets captions of COCO, and the photographs that they describe, for FID.

    python examples/photographs/coco.py coco --count 5000
    python examples/photographs/coco.py coco --count 5000 --captions captions_val2014.json --images val2014

Without files of your own, the first captions and photographs of the data set sayakpaul/coco-30-val-2014 on the Hub are taken
(COCO val 2014, a caption for each of 30,000 photographs; some 800 MB for 5,000; needs pyarrow). With COCO's own files
(annotations_trainval2014.zip and val2014.zip on cocodataset.org, or those of 2017), the first caption of each photograph, in the
order of the photographs' numbers. Writes captions.jsonl and the folder images.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffusers_infogain.files import read_json, save_text

REPOSITORY = "sayakpaul/coco-30-val-2014"
Photograph = tuple[str, str, bytes | Path]
"""The name of its file, its caption, and the file or its content."""


def from_the_hub() -> Iterator[Photograph]:
    """In the order of the data set; further files of it are downloaded only when they are needed."""
    from huggingface_hub import HfApi, hf_hub_download

    names = HfApi().list_repo_files(REPOSITORY, repo_type="dataset")
    for name in sorted(name for name in names if name.endswith(".parquet")):
        yield from from_parquet(Path(hf_hub_download(REPOSITORY, name, repo_type="dataset")))


def from_parquet(path: Path) -> Iterator[Photograph]:
    """The photographs of a file with the columns image and caption."""
    from pyarrow.parquet import ParquetFile

    for batch in ParquetFile(path).iter_batches(64, columns=["image", "caption"]):
        for i, row in enumerate(batch.to_pylist()):
            content = row["image"]["bytes"]
            suffix = ".png" if content.startswith(b"\x89PNG") else ".jpg"
            yield f"{path.stem}-{i}{suffix}", row["caption"], content


def from_files(captions: Path, images: Path) -> Iterator[Photograph]:
    """The photographs of COCO's own files."""
    content = read_json(captions)
    first: dict[int, str] = {}
    for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
        first.setdefault(annotation["image_id"], annotation["caption"])
    for image in sorted(content["images"], key=lambda image: image["id"]):
        if image["id"] in first:
            yield image["file_name"], first[image["id"]], images / image["file_name"]


def write(photographs: Iterator[Photograph], folder: Path, count: int) -> None:
    """Writes the first ones; captions.jsonl comes last, and says that all are there.

    Raises:
        ValueError: If there are fewer.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (name, caption, content) in zip(range(count), photographs, strict=False):
        target = folder / "images" / f"{number:06d}{Path(name).suffix}"
        if isinstance(content, Path):
            shutil.copyfile(content, target)
        else:
            target.write_bytes(content)
        lines.append(json.dumps({"prompt": " ".join(caption.split()), "photograph": target.name}))
    if len(lines) < count:
        raise ValueError(f"--count must be at most {len(lines)}, the number of photographs with captions, got {count}.")
    save_text("".join(line + "\n" for line in lines), folder / "captions.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="for captions.jsonl and images")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--captions", type=Path, help="COCO's captions_val2014.json or captions_val2017.json")
    parser.add_argument("--images", type=Path, help="folder of COCO's photographs")
    args = parser.parse_args()
    if (args.captions is None) != (args.images is None):
        parser.error("--captions and --images must be given together")
    path = args.folder / "captions.jsonl"
    if path.exists() and len(path.read_text(encoding="utf-8").splitlines()) == args.count:
        print(f"{path} is there already.")
        return
    photographs = from_files(args.captions, args.images) if args.captions else from_the_hub()
    write(photographs, args.folder, args.count)
    print(f"{args.count} captions and photographs written to {args.folder}.")


if __name__ == "__main__":
    main()
