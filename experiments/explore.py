"""README, "Sampling": one page, without network or library, on which one sees how tokens become pictures.

    python experiments/explore.py --ckpt checkpoints/cifar10.pt --out explore.html

First panel: a class and a seed, and a slider over the groups of tokens. Second panel: another picture's first tokens
are kept (section 5.1), and a slider says how many. Pictures of more than 128 pixels are shown with 128.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import dar

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>D-AR, group by group</title>
<style>
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }
body { max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem } p { margin: .3rem 0 .8rem; max-width: 46rem }
.row { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem; align-items: end; margin: .8rem 0 }
label { display: grid; gap: .2rem; font-size: .9rem } label.wide { flex: 1 1 16rem }
select, input { font: inherit; width: 100%; min-height: 2rem } :focus-visible { outline: 3px solid #e8590c }
figure { margin: 0; flex: 1 1 12rem; max-width: 20rem } figcaption { font-size: .85rem; margin-top: .3rem }
.picture { aspect-ratio: 1; image-rendering: pixelated; background-repeat: no-repeat; border-radius: 6px }
#tokens { display: grid; gap: 2px; aspect-ratio: 1; align-content: stretch; border-radius: 6px }
#tokens span { border-radius: 2px; display: grid; place-items: center; font-size: clamp(6px, 1.1vw, 10px); color: #000 }
#tokens .now { outline: 2px solid currentColor } #tokens .later { background: #8883 !important; color: #8880 }
#layouts { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)); gap: .6rem; max-width: none }
</style>
<h1>D-AR: an image is written token by token, and each group of tokens takes one step of the diffusion</h1>
<h2>Streaming</h2>
<p>A Llama writes the tokens from left to right, row by row. Whenever a group (a row) is complete, the flow takes its
next step from noise to image, and its velocity gives a preview for free (Fig. 1, section 3.3).</p>
<div class="row"><label>Class<select id="class"></select></label><label>Seed<select id="seed"></select></label>
<label class="wide"><span id="said" aria-live="polite"></span><input id="group" type="range" min="1"></label></div>
<div class="row" style="align-items: start">
<figure><div id="tokens" role="img"></div><figcaption>Tokens: each colour and number is a code.</figcaption></figure>
<figure><div class="picture" id="flow" role="img"></div><figcaption>Flow: from noise to image.</figcaption></figure>
<figure><div class="picture" id="preview" role="img"></div>
<figcaption>Preview: where the flow would end if it went straight on.</figcaption></figure></div>
<h2>Layout</h2>
<p>The first tokens carry the layout. Here the first ones of one picture are kept, and the Llama writes the rest for
other classes (Fig. 6, section 5.1). If all are kept, all pictures are that one.</p>
<div class="row"><label class="wide"><span id="keptsaid" aria-live="polite"></span>
<input id="kept" type="range" min="0"></label></div>
<div id="layouts"></div>
<script id="data" type="application/json">DATA</script>
<script>
const $ = id => document.getElementById(id), data = JSON.parse($("data").textContent), K = data.groups
const show = (element, sprite, column, columns, row, rows) => {
  element.style.backgroundImage = `url(${sprite})`
  element.style.backgroundSize = `${100 * columns}% ${100 * rows}%`
  const place = (i, count) => `${100 * i / Math.max(count - 1, 1)}%`
  element.style.backgroundPosition = `${place(column, columns)} ${place(row, rows)}` }
data.names.forEach((name, i) => $("class").add(new Option(name, i)))
data.seeds.forEach((seed, i) => $("seed").add(new Option(seed, i)))
$("group").max = K; $("group").value = Math.ceil(K / 2); $("kept").max = K; $("kept").value = 1
for (let i = 0; i < data.codes[0].length; i++) $("tokens").append(document.createElement("span"))
$("tokens").style.gridTemplateColumns = `repeat(${data.codes[0].length / K}, 1fr)`
data.names.forEach(name => {
  const [figure, picture, caption] = ["figure", "div", "figcaption"].map(tag => document.createElement(tag))
  caption.textContent = name; picture.className = "picture"; figure.append(picture, caption)
  $("layouts").append(figure) })
function draw() {
  const [label, seed, group, kept] = ["class", "seed", "group", "kept"].map(id => +$(id).value)
  const which = label * data.seeds.length + seed
  const codes = data.codes[which], size = codes.length / K
  $("said").textContent = `Group ${group} of ${K}: ${group * size} of ${codes.length} tokens are written`
  codes.forEach((code, i) => { const cell = $("tokens").children[i], of = Math.floor(i / size) + 1
    cell.className = of == group ? "now" : of > group ? "later" : ""
    cell.style.background = `hsl(${code * 137.5 % 360} 65% ${55 + code * 7 % 25}%)`
    cell.textContent = size > 16 ? "" : code })
  $("tokens").ariaLabel = `tokens of the group: ${codes.slice((group - 1) * size, group * size).join(" ")}`
  show($("flow"), data.sprites[which], group - 1, K, 0, 2); $("flow").ariaLabel = `flow after ${group} groups`
  show($("preview"), data.sprites[which], group - 1, K, 1, 2); $("preview").ariaLabel = `preview after ${group} groups`
  $("keptsaid").textContent = `${kept * size} of ${codes.length} tokens are those of: ${data.source}`
  document.querySelectorAll("#layouts .picture").forEach((picture, i) =>
    show(picture, data.layouts, i, data.names.length, kept, K + 1)) }
document.addEventListener("input", draw); draw()
</script></html>
"""


def sprite(images: Tensor, columns: int) -> str:
    """Float images [n, 3, H, W] side by side, row by row, as a data URL."""
    if images.shape[-1] > 128:
        images = F.interpolate(images, (128, 128), mode="area")
    file = io.BytesIO()
    dar.tile(images.float().cpu(), columns, gap=0).save(file, "WEBP", quality=88, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="a Llama with its tokenizer, as sample.py takes it")
    parser.add_argument("--out", type=Path, default=Path("explore.html"), help="the page (default: explore.html)")
    parser.add_argument("--classes", type=int, nargs="+", help="numbers (default: the first ten)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="default: 0 1 2 3")
    parser.add_argument("--cfg", type=float, default=4.0, help="guidance (default: 4)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args()
    dar.require(args.out.absolute().parent.is_dir() and not args.out.is_dir(), f"--out {args.out}: expected a new file")
    device = dar.pick_device(args.device)
    ar = dar.prepare_for_sampling(dar.load_ar(args.ckpt, device))
    dar.require(ar.tokenizer is not None, f"{args.ckpt}: holds no tokenizer; make a bundle by sample.py --save-bundle")
    c, classes = ar.tokenizer.config, args.classes or list(range(min(10, ar.config.num_classes)))
    wrong = [number for number in classes if not 0 <= number < ar.config.num_classes]
    dar.require(not wrong, f"--classes {wrong}: expected 0 ... {ar.config.num_classes - 1}")
    names = [ar.class_names[number] if ar.class_names else str(number) for number in classes]

    def pictures(labels: list[int], seeds: list[int], prefix: Tensor | None = None) -> list[dar.StreamStep]:
        return list(dar.stream(ar, ar.tokenizer, torch.tensor(labels, device=device), args.cfg, seeds, prefix=prefix))

    data = {"groups": c.num_groups, "names": names, "seeds": args.seeds, "codes": [], "sprites": []}
    for number in classes:
        steps = pictures([number] * len(args.seeds), args.seeds)
        data["codes"] += steps[-1].codes.tolist()
        for i in range(len(args.seeds)):
            shown = torch.stack([step.x[i] for step in steps] + [step.preview[i] for step in steps])
            data["sprites"].append(sprite(shown, c.num_groups))
    kept = [n * c.group_size for n in range(c.num_groups + 1)]
    prefix, seed = torch.tensor(data["codes"][0], device=device), args.seeds[0]
    layouts = [pictures(classes, [seed] * len(classes), prefix[:n])[-1].x for n in kept]
    data |= {"layouts": sprite(torch.cat(layouts), len(classes)), "source": f"{names[0]}, seed {seed}"}
    page = PAGE.replace("DATA", json.dumps(data).replace("<", "\\u003c")).encode()
    dar.require(
        len(page) < 2e6, f"the page would have {len(page) / 1e6:.1f} MB, over 2: give fewer --classes or --seeds"
    )
    dar.write_atomically(args.out, lambda file: file.write(page))
    print(f"wrote {args.out}, {len(page) / 1e6:.1f} MB: open it in a browser")


if __name__ == "__main__":
    dar.command_line(main)
