"""Synthetic serial sections of tissue, with labels, to try the scripts on: data/prepare.py writes them to files.

    from data.sample import make_sample
    folders = make_sample()

Scores on them mean nothing for real tissue.
"""

import cv2
import numpy as np

SAMPLE_SIZE = 256


def smooth_noise(rng, shape, sigmas):
    """Return Gaussian-blurred white noise, float32 of `shape`, mean 0 and deviation 1.

    Blurring in Fourier space makes wide blurs in three dimensions cheap.
    """
    spectrum = np.fft.rfftn(rng.standard_normal(shape))
    for axis, (n, sigma) in enumerate(zip(shape, sigmas, strict=True)):
        last = axis == len(shape) - 1
        frequency = np.fft.rfftfreq(n) if last else np.fft.fftfreq(n)
        along_axis = [1] * len(shape)
        along_axis[axis] = -1
        spectrum *= np.exp(-2 * (np.pi * sigma * frequency) ** 2).reshape(along_axis)
    noise = np.fft.irfftn(spectrum, shape)
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def noise2d(rng, sigma):
    """Return smooth_noise for one slice."""
    return smooth_noise(rng, (SAMPLE_SIZE, SAMPLE_SIZE), (sigma, sigma))


def pack_cells(rng):
    """Return rows of (x, y, radius), float32 (N, 3): few large cells, small ones between them."""
    cells = []
    for radius in np.sort(np.clip(rng.lognormal(2.6, 0.75, 260), 8, 52))[::-1]:
        for _ in range(20):
            x, y = rng.uniform(-30, SAMPLE_SIZE + 30, 2)
            if all(np.hypot(x - a, y - b) > 0.95 * (radius + r) for a, b, r in cells):
                cells.append((x, y, radius))
                break
    return np.array(cells, np.float32)


def divide(xs, ys, centres, radii):
    """Give each pixel to the cell whose rim is nearest.

    Returns owner, int32 (H, W), and the distance to the nearest border, float32 (H, W).
    Subtracting the radius makes large cells bulge into small ones; straight borders, as between
    equal cells, bend because the coordinates `xs`, `ys` are warped.
    """
    owner = np.zeros(xs.shape, np.int32)
    nearest = np.full(xs.shape, np.inf, np.float32)
    for k, ((x, y), radius) in enumerate(zip(centres, radii, strict=True)):
        rim = np.sqrt((xs - x) ** 2 + (ys - y) ** 2) - radius
        owner[rim < nearest] = k
        nearest = np.minimum(nearest, rim)
    off_border = np.ones(xs.shape, np.uint8)
    off_border[:, 1:] &= owner[:, 1:] == owner[:, :-1]
    off_border[1:] &= owner[1:] == owner[:-1]
    return owner, cv2.distanceTransform(off_border, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)


def draw_cytoplasm(rng, owner, border, tone, grain):
    """Return one slice without membranes: grey by cell, texture, dark specks, vesicles."""
    clump = noise2d(rng, 16)
    image = cv2.GaussianBlur(tone[owner], (0, 0), 2) + 7 * noise2d(rng, 6)
    image += cv2.GaussianBlur(grain[owner], (0, 0), 2) * noise2d(rng, 1.6)
    image -= 20 * np.maximum(noise2d(rng, 1.3) - 0.6, 0) * np.exp(0.5 * clump)
    vesicles = np.zeros_like(image)
    for x, y in rng.integers(0, SAMPLE_SIZE, (420, 2)).tolist():
        if clump[y, x] + rng.normal(0, 0.7) > 0.5 and border[y, x] > 5:
            radius, dark = rng.uniform(1, 4.5), rng.uniform(20, 75)
            line = 2 if radius > 2 else -1  # the large ones are hollow
            cv2.circle(vesicles, (16 * x, 16 * y), int(16 * radius), dark, line, cv2.LINE_AA, 4)
    return image - cv2.GaussianBlur(vesicles, (0, 0), 0.9)


def draw_mitochondrion(rng, image, x, y, radius, stretch, angle, room):
    """Darken `image` inside an ellipse around x = y = 0, no further than `room` (pixels) allows."""
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    depth = np.minimum(radius - np.hypot(u / stretch, v * stretch), room)
    folds = np.sin(0.9 * u + 2.2 * noise2d(rng, 5))
    rim = np.exp(-(((depth - 1.5) / 1.5) ** 2))
    inner = 92 + 20 * folds + 12 * noise2d(rng, 2) - 30 * rim
    image += np.clip(depth / 2 + 0.5, 0, 1) * (inner - image)


def make_tissue(rng, count):
    """Return what make_stack draws: cells in 2 count + 1 planes, half a section apart.

    A dict of arrays with the planes first: xs, ys (warped coordinates), centres, owner (the cell of each pixel), border
    (distance to the nearest border, pixels), width (of membrane), membrane (how dark it is, 0 to 1); of arrays with an
    item a cell: tone, grain, swelling (of mitochondria, by plane); and mitochondria, a list.
    """
    planes = 2 * count + 1
    shape = (planes, SAMPLE_SIZE, SAMPLE_SIZE)
    ys, xs = np.mgrid[:SAMPLE_SIZE, :SAMPLE_SIZE].astype(np.float32)
    # Noise that is smooth across planes too, so that cells bend, and bend on from slice to slice.
    xs, ys = (
        axis + 9 * smooth_noise(rng, shape, (6, 20, 20)) + 1.5 * smooth_noise(rng, shape, (3, 5, 5))
        for axis in (xs, ys)
    )
    cells = pack_cells(rng)
    time = np.arange(planes, dtype=np.float32)[:, None, None] - count
    centres = cells[:, :2] + time * rng.normal(0, 0.3, (len(cells), 2)).astype(np.float32)
    radii = cells[:, 2] * (1 + 0.1 * smooth_noise(rng, (planes, len(cells)), (6, 0)))
    divided = [divide(*plane) for plane in zip(xs, ys, centres, radii, strict=True)]
    owner, border = (np.stack(part) for part in zip(*divided, strict=True))

    # Membrane varies along its course: in width, and down to where it can hardly be seen.
    width = 2.9 * np.exp(0.22 * smooth_noise(rng, shape, (2, 10, 10)))
    strength = 1 / (1 + np.exp(-1.7 - 1.3 * smooth_noise(rng, shape, (1, 12, 12))))
    membrane = strength * np.exp(-((border / width) ** 2))
    tone = rng.normal(162, 9, len(cells)).astype(np.float32)
    grain = rng.uniform(4, 15, len(cells)).astype(np.float32)
    mitochondria = [
        (k, cells[k, 2] * rng.uniform(-0.5, 0.5, 2), rng.uniform(13, 22), rng.uniform(1, 1.5), rng.uniform(0, 3))
        for k in np.flatnonzero(cells[:, 2] > 20)
        if rng.random() < 0.7
    ]
    swelling = 1 + 0.3 * smooth_noise(rng, (len(cells), planes), (0, 5))
    names = ("xs", "ys", "centres", "owner", "border", "width", "membrane", "tone", "grain", "mitochondria", "swelling")
    return dict(
        zip(names, (xs, ys, centres, owner, border, width, membrane, tone, grain, mitochondria, swelling), strict=True)
    )


def make_stack(seed, count):
    """Return synthetic serial sections and their labels, each uint8 (count, 256, 256).

    A section shows the mean of three planes: a membrane that runs at a slant through it comes out wide and faint, as
    under the microscope. Mitochondria and vesicles look like membrane to a threshold and are interior in the label. The
    numbers were chosen so that grey levels, cell sizes and the share of membrane are like those of ISBI 2012.
    """
    rng = np.random.default_rng(seed)
    tissue = make_tissue(rng, count)
    images, labels = [], []
    for z in range(1, 2 * count + 1, 2):
        owner, border = tissue["owner"][z], tissue["border"][z]
        image = draw_cytoplasm(rng, owner, border, tissue["tone"], tissue["grain"])
        for k, offset, radius, stretch, angle in tissue["mitochondria"]:
            x, y = tissue["centres"][z, k] + offset
            room = np.where(owner == k, border - 5, -9)
            size = radius * tissue["swelling"][k, z]
            draw_mitochondrion(rng, image, tissue["xs"][z] - x, tissue["ys"][z] - y, size, stretch, angle, room)
        image -= tissue["membrane"][z - 1 : z + 2].mean(axis=0) * (image - 38)
        image += 1.4 * np.sqrt(np.maximum(image, 0)) * noise2d(rng, 0.65)  # shot noise
        image = 128 + rng.uniform(0.95, 1.3) * (image - 133)  # each section is stained anew
        image += 9 * noise2d(rng, 70) + rng.normal(0, 6)  # uneven light
        images.append(np.clip(image, 0, 255).astype(np.uint8))
        label = np.where(border > 1.05 * tissue["width"][z], 255, 0).astype(np.uint8)
        # Like an annotator, paint over slivers that are too thin to be told from membrane.
        brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
        labels.append(cv2.morphologyEx(label, cv2.MORPH_OPEN, brush))
    return np.stack(images), np.stack(labels)


def make_sample():
    """Return {folder: uint8 (N, 256, 256)}: 20 training pairs, 5 test pairs of other tissue."""
    (image, label), (test_image, test_label) = make_stack(0, 20), make_stack(1, 5)
    names = ("train_image", "train_label", "test_image", "test_label")
    return dict(zip(names, (image, label, test_image, test_label), strict=True))
