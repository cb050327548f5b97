"""A page on which to paint layouts and see what an adapter makes of them, on this machine only.

    python tools/paint.py                     the toy world
    python tools/paint.py --adapter FILE --sd FILE
"""
import os
import signal
import sys

if __name__ == "__main__":
    # Ctrl-C during the slow imports below ends without a traceback; `main` handles it later.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # Idle OpenMP threads sleep instead of spinning.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
sys.path[:0] = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]

import argparse
import base64
import io
import json
import re
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

from PIL import Image

from aldm import pick_device
from data import ASSETS, InputError, open_dataset, opened, read_layout, refuse
from sample import ADAPTER, generate, load_model, resize_nearest, to_pixels
from tools.command import guard_streams, number
from tools.run import note, run_command

PAGE = ASSETS / "paint.html"
BODY = 4 * 2**20  # bytes of a layout at most; a painted 512 x 1024 takes a small part of it
PIXELS = 4 * 2**20  # of a layout at most, or 16 times the canvas
PREVIEWS = 6  # estimates decoded on the way; on a CPU each takes as long as a step
POLICY = ("default-src 'self' 'unsafe-inline' data:; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


# -- requests --------------------------------------------------------------------------------------


def decode_layout(content, name, classes, size):
    """A layout's file, as bytes, and its name -> label [H,W]. InputError for one that is far larger
    than the canvas, `size`, before it is decoded."""
    height, width = size
    with opened(io.BytesIO(content), "the layout") as image:
        w, h = image.size
    if w * h > max(PIXELS, 16 * height * width):
        raise InputError(f"the layout: {w} x {h} pixels are far more than the canvas's {width} x "
                         f"{height}; make it smaller")
    # A file's name tells the kind of its ids.
    kind = re.search("labelTrainIds|labelIds|$", name)[0]
    return read_layout(io.BytesIO(content), classes, name=f"the layout {kind}".strip())


def read_words(given):
    """A request's fields, texts -> prompt, negative, seed, steps, cfg"""
    words = {"prompt": given.get("prompt", ""), "negative": given.get("negative", "")}
    kinds = {"seed": number(0, 2**32 - 1, int), "steps": number(1, 1000, int),
             "cfg": number(0, 50)}
    for key, parse in kinds.items():
        try:
            words[key] = parse(given.get(key, ""))
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{key} {error}") from None
    return words


def base64_text(content):
    return base64.b64encode(content).decode()


def base64_png(pixels):
    """uint8 [H,W,3]"""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return base64_text(file.getvalue())


# -- the server ------------------------------------------------------------------------------------


class PageServer(ThreadingHTTPServer):
    """page: its bytes; size: (height, width) of its canvas; model; hosts: names that browsers on
    this machine may call it by; decoding, painting: locks."""

    def get_request(self):
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.5)  # out of file descriptors: wait until some are free
            raise

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # an OSError: the client has left
            note(f"a request failed: {error!r}")


class PageHandler(BaseHTTPRequestHandler):
    """GET returns the page. POST /layout?name=... reads a layout's file, the request's body. POST
    /generate?prompt=... paints such a layout and streams lines of JSON, one for each step."""
    timeout = 30  # seconds without a byte from a client, or to one

    def log_message(self, *args):
        pass

    def answer(self, code, kind, body=b""):
        """The body ends with the connection: more may follow."""
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(body)

    def send(self, **line):
        self.wfile.write(json.dumps(line).encode() + b"\n")

    def check_origin(self):
        """Refuses pages of other sites, whether they use their own name or one that points here."""
        hosts = self.server.hosts
        origins = [None, *(f"http://{host}" for host in hosts)]
        if self.headers["Host"] not in hosts or self.headers["Origin"] not in origins:
            raise InputError(f"only for http://{hosts[-1]} (forward a port to the same number)")

    def do_GET(self):
        try:
            self.check_origin()
            self.answer(200, "text/html; charset=utf-8", self.server.page)
        except InputError as error:
            self.answer(400, "text/plain", str(error).encode())

    def do_POST(self):
        server = self.server
        try:
            content = self.read_body()
            self.check_origin()
            path, _, query = self.path.partition("?")
            given = dict(parse_qsl(query))
            words = read_words(given) if path == "/generate" else None
            with server.decoding:  # one at a time, for the memory's sake
                layout = decode_layout(content, given.get("name", ""), server.model.classes,
                                       server.size)
        except InputError as error:
            self.answer(400, "application/json")
            return self.send(error=str(error))
        self.answer(200, "application/x-ndjson")
        label = resize_nearest(layout, *server.size)
        if words is None:
            text = base64_text(label.byte().numpy().tobytes())
            return self.send(layout=text, size=layout.shape[::-1])
        with server.painting:
            self.paint(server.model, label, **words)

    def read_body(self):
        length = self.headers["Content-Length"] or ""
        if not re.fullmatch("[0-9]{1,12}", length) or int(length) > BODY:
            raise InputError(f"a request must state its length, at most {BODY} bytes")
        return self.rfile.read(int(length))

    def send_step(self, model, steps, i, x0_hat):
        """After each step: a line, for some of them with the estimate as an image."""
        line = {"step": i + 1, "of": steps}
        if i % (steps // PREVIEWS + 1) == 0:
            line["image"] = base64_png(to_pixels(model.vae.decode(x0_hat.float()))[0])
        self.send(**line)

    def paint(self, model, label, prompt, negative, seed, steps, cfg):
        """Send what the model makes of label [H,W]."""
        start = time.time()
        try:
            unread = model.text.cut(prompt)
            if unread:
                self.send(note=f"the prompt is too long; the model ignores its end: {unread}")
            image = generate(model, label[None], [prompt], [seed], negative, steps, cfg,
                             precision=self.server.precision,
                             on_step=partial(self.send_step, model, steps))[0]
        except (RuntimeError, ValueError) as error:  # such as a GPU out of memory
            return self.send(error=f"the generation failed: {' '.join(str(error).split()):.300}")
        self.send(image=base64_png(image), done=True, seconds=time.time() - start)


def painter(model, port, examples, prompts, steps, cfg, precision=None):
    """The page's server, for this machine only. examples: labels uint8 [H,W] of one size, whose
    classes come first in the page; without any, the canvas is a square of the preset's size."""
    height, width = examples[0].shape if examples else (model.preset.size,) * 2
    world = {"names": model.classes.names, "palette": model.classes.palette.tolist(),
             "examples": [base64_text(label.tobytes()) for label in examples],
             "height": height, "width": width, "prompts": prompts, "steps": steps, "cfg": cfg,
             "limit": BODY}
    text = json.dumps(world).replace("<", "\\u003c")  # no name can end the script
    server = PageServer(("127.0.0.1", port), PageHandler)
    server.page = PAGE.read_text("utf-8").replace("__WORLD__", text).encode()
    server.model = model
    server.size = height, width
    server.precision = precision
    server.decoding = threading.Lock()
    server.painting = threading.Lock()
    port = "" if server.server_port == 80 else f":{server.server_port}"  # browsers leave 80 out
    server.hosts = [f"localhost{port}", f"127.0.0.1{port}"]
    return server


# -- the command line ------------------------------------------------------------------------------


def parse_args():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = refuse
    add = p.add_argument
    add("--adapter", default=ADAPTER, help="a file, a run's folder, or USER/REPO/FILE on the "
        "Hugging Face hub")
    add("--sd", metavar="FILE", help="Stable Diffusion 1.x, as for sample.py")
    add("--data", help="the data set whose classes are painted (default: the adapter's)")
    add("--class-embeddings", metavar="FILE", help="those an official adapter was trained with")
    add("--steps", type=number(1, 1000, int), default=25, help="of DDIM (default: 25)")
    add("--cfg", type=number(0, 50), help="guidance scale (toy: 5, sd15: 7.5)")
    add("--port", type=number(0, 65535, int), default=8000, help="(default: 8000)")
    add("--device", help="cpu or cuda (default: cuda if available)")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 on CUDA, fp32 on a CPU")
    return p.parse_args()


def list_examples(model):
    """-> the page's example layouts uint8 [H,W] and prompts"""
    examples = []
    prompts = []
    if model.classes.key == "toy":
        dataset = open_dataset("toy", split="val")
        examples = [dataset.full(i)[1].byte().numpy() for i in range(1, 13)]
    if model.classes.key in ("toy", "cityscapes"):
        prompts = ["a street on a clear day", "a street at night", "a street in snow"]
    return examples, prompts


def serve():
    args = parse_args()
    model = load_model(args.adapter, args.sd, pick_device(args.device), args.data,
                       args.class_embeddings, args.precision)
    cfg = model.preset.guidance if args.cfg is None else args.cfg
    examples, prompts = list_examples(model)
    try:
        server = painter(model, args.port, examples, prompts, args.steps, cfg, args.precision)
    except OSError as error:
        raise InputError(f"port {args.port}: {error.strerror}; choose another --port") from None
    print(f"paint a layout at http://{server.hosts[-1]} (Ctrl+C ends)", flush=True)
    with server:
        server.serve_forever()


def main():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    guard_streams()
    try:
        run_command("paint.py", serve)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
