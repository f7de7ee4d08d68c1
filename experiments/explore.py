"""A page, without network or library, on which one sees how tokens become pictures.

    python experiments/explore.py --out explore.html
    python experiments/explore.py --classes horse ship --seeds 51 7

First panel: a class and a seed, and a slider over the groups of tokens. Second panel: the first
tokens of another picture are kept (section 5.1), and a slider says how many. explore_page.html is
the page without its pictures.
"""

import argparse
import base64
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dar
from common.cli import command_line, integer, real
from common.distributed import pick_device
from common.files import write_atomically
from common.images import tile
from common.speed import prepare_for_sampling
from sample import SHIPPED, class_names, output_file, parse_classes

# A page of some 2 MB: noise takes a byte for each pixel, other pictures less.
MAX_PIXELS = 2_500_000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ckpt", default=SHIPPED, help="a Llama with its tokenizer (default: the one that ships)")
    add("--out", type=output_file(".html"), default=Path("explore.html"), help="explore.html")
    add("--classes", nargs="+", help="names or numbers (default: the first ten)")
    add("--seeds", nargs="+", type=integer(0), default=[0, 1, 2, 3], help="default: 0 1 2 3")
    add("--cfg", type=real(0), default=4.0, help="guidance (default: 4)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args()


def choose_size(image_size: int, num_images: int) -> int:
    """Pixels a side with which the page shows its images: at most 128, and fewer where there are
    many. Raises ValueError if it would be fewer than 32."""
    size = min(image_size, 128)
    while num_images * size**2 > MAX_PIXELS and size >= 64:
        size //= 2
    if num_images * size**2 > MAX_PIXELS:
        raise ValueError(f"{num_images} images are too many: give fewer --classes or --seeds")
    return size


def make_sheet(images: Tensor, columns: int, size: int) -> str:
    """Float images [n, 3, H, W] side by side, row by row, as a data URL."""
    if images.shape[-1] > size:
        images = F.interpolate(images, (size, size), mode="area")
    file = io.BytesIO()
    tile(images.float().cpu(), columns, gap=0, zoom=1).save(file, "WEBP", quality=88, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    ar = prepare_for_sampling(dar.load_ar(args.ckpt, device))
    if ar.tokenizer is None:
        raise ValueError(
            f"{args.ckpt}: carries no tokenizer; make one file by sample.py --save-bundle"
        )
    config = ar.tokenizer.config
    all_names = class_names(ar)
    classes = parse_classes(args.classes, all_names)
    if args.classes is None:
        classes = classes[:10]
    names = [all_names[number] for number in classes]
    num_groups = config.num_groups
    num_images = len(classes) * (2 * num_groups * len(args.seeds) + num_groups + 1)
    size = choose_size(config.image_size, num_images)

    def draw(labels: list[int], seeds: list[int], prefix=None) -> list[dar.StreamStep]:
        labels = torch.tensor(labels, device=device)
        return list(dar.stream(ar, ar.tokenizer, labels, args.cfg, seeds, prefix=prefix))

    # A sheet for each class and seed: above the flow after each group, below the previews.
    codes = []
    sheets = []
    for number in classes:
        steps = draw([number] * len(args.seeds), args.seeds)
        codes += steps[-1].codes.tolist()
        flow = torch.stack([step.x for step in steps], 1)  # [seeds, K, 3, H, W]
        previews = torch.stack([step.preview for step in steps], 1)
        for images in torch.cat((flow, previews), 1):
            sheets.append(make_sheet(images, num_groups, size))

    # And one for the layouts: a row for each number of groups that are kept, a column for each
    # class.
    source = torch.tensor(codes[0], device=device)
    seeds = [args.seeds[0]] * len(classes)
    layouts = []
    for kept in range(num_groups + 1):
        prefix = source[: kept * config.group_size]
        layouts.append(draw(classes, seeds, prefix)[-1].x)

    data = {
        "groups": num_groups,
        "names": names,
        "seeds": args.seeds,
        "codes": codes,
        "sheets": sheets,
        "layouts": make_sheet(torch.cat(layouts), len(classes), size),
        "source": f"{names[0]}, seed {args.seeds[0]}",
    }
    text = json.dumps(data).replace("<", "\\u003c")  # a class's name may look like a tag
    template = Path(__file__).with_name("explore_page.html").read_text(encoding="utf-8")
    page = template.replace("DATA", text)
    write_atomically(args.out, lambda path: path.write_text(page, encoding="utf-8"))
    print(f"wrote {args.out}, {len(page) // 1000} KB: open it in a browser")


if __name__ == "__main__":
    command_line(main)
