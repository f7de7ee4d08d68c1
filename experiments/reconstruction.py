"""README.md here, "What the shipped model is": held-out PSNR and code use of a tokenizer.

python experiments/reconstruction.py checkpoints/cifar10.pt cifar10/test
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dar
import train_tokenizer
import training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", help="folder with one sub-folder of images a class, or the word 'shapes'")
    parser.add_argument("--num", type=int, default=10_000, help="images (default: 10000)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--picture", help="also write originals, previews and reconstructions there")
    args = parser.parse_args()
    device = dar.pick_device(args.device)
    tokenizer = train_tokenizer.find_tokenizer(args.checkpoint, device)
    data = training.ImageData(args.data, tokenizer.config.image_size, held_out=True)
    if args.picture:
        train_tokenizer.reconstruction_picture(tokenizer, data, device).save(args.picture)
    found = train_tokenizer.held_out(tokenizer, data, args.num, device)
    print(
        f"{min(args.num, len(data))} images: {found['val_psnr']:.2f} dB, {found['val_code_use']:.1%} of the codes seen"
    )


if __name__ == "__main__":
    dar.command_line(main)
