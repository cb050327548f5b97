"""Pictures for people: grids of images, and curves of losses."""
import warnings

import numpy as np
from PIL import Image, ImageDraw

from tools.files import write_png


def grid(rows, titles=()):
    """Rows of uint8 pictures [H,W,3] -> PIL.Image with gaps of 2 pixels. Pictures of up to 128
    pixels are doubled. `titles` stand above the columns, truncated to their width."""
    height = max(pixels.shape[0] for row in rows for pixels in row)
    width = max(pixels.shape[1] for row in rows for pixels in row)
    scale = 2 if max(height, width) <= 128 else 1
    height, width = scale * height + 2, scale * width + 2  # from one picture to the next
    top = 14 if titles else 0
    columns = max(map(len, rows))
    canvas = Image.new("RGB", (columns * width - 2, top + len(rows) * height - 2), "white")
    for i, row in enumerate(rows):
        for j, pixels in enumerate(row):
            picture = Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))
            canvas.paste(picture, (j * width, top + i * height))
    pen = ImageDraw.Draw(canvas)
    for j, title in enumerate(titles):
        while pen.textlength(title) > width - 4:
            title = title[:-1]
        pen.text((j * width + 2, 1), title, fill="black")
    return canvas


def draw_curves(log_csv, path, width=320, height=100):
    """log.csv of train.py -> a PNG with one panel per loss, scaled from its minimum to its maximum.
    Long curves are averaged over neighbouring steps. Without losses no file is written."""
    curves = read_curves(log_csv)
    if not curves:
        return
    canvas = Image.new("RGB", (width, len(curves) * height), "white")
    pen = ImageDraw.Draw(canvas)
    for panel, (name, points) in enumerate(curves.items()):
        top = panel * height
        step, last = points[-1]
        parts = np.array_split(points, min(len(points), width // 2))
        points = np.array([part.mean(0) for part in parts])
        low, high = points.min(0), points.max(0)
        x, y = ((points - low) / np.maximum(high - low, 1e-12)).T  # 0..1
        title = f"{name}: {last:.4g} at step {step:.0f} ({low[1]:.3g} to {high[1]:.3g})"
        pen.text((4, top + 2), title, fill="black")
        pen.line(list(zip(4 + x * (width - 8), top + height - 6 - y * (height - 26))), fill="navy")
    write_png(path, canvas)


def read_curves(log_csv):
    """log.csv (step, then losses) -> {loss: its steps and values [n,2]}. Cells without a number,
    such as those of losses that were not computed, are skipped."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torn lines
            table = np.genfromtxt(log_csv, delimiter=",", names=True, invalid_raise=False)
        step, *losses = table.dtype.names
    except (OSError, ValueError, IndexError):  # no such file, or not a table
        return {}
    curves = {name: np.stack([table[step], table[name]], -1).reshape(-1, 2) for name in losses}
    curves = {name: points[np.isfinite(points).all(1)] for name, points in curves.items()}
    return {name: points for name, points in curves.items() if len(points)}
