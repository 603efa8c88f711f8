"""Synthetic serial sections of tissue and their labels; scores on them mean nothing for real tissue. Membranes of
varying width part grainy cells; vesicles and mitochondria in these are as dark, so that no grey level tells the two."""

import cv2
import numpy as np

SIDE = 256


def noise(rng, sigma):
    """Smooth noise, float32 (SIDE, SIDE), mean 0 and standard deviation 1."""
    smooth = cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE), np.float32), (0, 0), sigma)
    return (smooth - smooth.mean()) / smooth.std()


def draw_organelles(rng, image, border):
    """Darken spots far enough from the border: vesicles, which are small, and mitochondria with a rim and folds."""
    spots = np.zeros_like(image)
    for y, x in rng.integers(0, SIDE, (700, 2)).tolist():
        radius, dark = rng.uniform(1, 4), rng.uniform(20, 70)
        if border[y, x] > 3 + radius:
            cv2.circle(spots, (x, y), round(radius), dark, 1 if radius > 2 else -1, cv2.LINE_AA)
    for y, x in rng.integers(0, SIDE, (45, 2)).tolist():
        if border[y, x] > 15:
            axes = round(rng.uniform(10, 15)), round(rng.uniform(7, 12))
            ellipse = (x, y), axes, rng.uniform(0, 180), 0, 360
            body = cv2.ellipse(np.zeros_like(image), *ellipse, 1, -1)
            spots = np.where(body > 0, 55 + 15 * np.sin(noise(rng, 3) * 4), spots)
            cv2.ellipse(spots, *ellipse, 90, 2, cv2.LINE_AA)
    image -= cv2.GaussianBlur(spots, (0, 0), 0.9)


def make_stack(seed, count):
    """Sections and their labels, uint8 (2, count, 256, 256), in grey levels and membrane's share like ISBI 2012."""
    rng = np.random.default_rng(seed)
    centres, drift = rng.uniform(-30, SIDE + 30, (52, 2)), rng.normal(0, 0.6, (52, 2))
    sizes, tone, grain = rng.exponential(700, 52), rng.normal(162, 9, 52), rng.uniform(4, 15, 52)
    bends = np.array([[9 * noise(rng, 20) + 1.5 * noise(rng, 5) for _ in range(2)] for _ in range(2)])
    stack = np.zeros((2, count, SIDE, SIDE), np.uint8)
    for z in range(count):
        place = np.float32(np.mgrid[:SIDE, :SIDE] + np.cos(z / 6) * bends[0] + np.sin(z / 6) * bends[1])
        # A pixel's cell is the nearest one, of two neighbours that with more size gets more; border: pixels up to it.
        squares = np.sum((place[:, None] - (centres + z * drift).T[:, :, None, None]) ** 2, axis=0)
        cell = np.argmin(squares - sizes[:, None, None], axis=0).astype(np.uint8)
        inside = cv2.morphologyEx(cell, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8)) == 0
        border = cv2.distanceTransform(np.uint8(inside), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        width = 2.5 * np.exp(0.22 * noise(rng, 10))
        image = cv2.GaussianBlur(tone[cell], (0, 0), 2) + 7 * noise(rng, 6)
        image += cv2.GaussianBlur(grain[cell], (0, 0), 2) * noise(rng, 1.6)
        image -= 20 * np.maximum(noise(rng, 1.3) - 0.6, 0) * np.exp(0.5 * noise(rng, 16))
        draw_organelles(rng, image, border)
        strength = 1 / (1 + np.exp(-1.4 - 1.4 * noise(rng, 12)))  # down to where it can hardly be seen
        image -= strength * np.exp(-((border / width) ** 2)) * (image - 38)
        image += 1.4 * np.sqrt(np.maximum(image, 0)) * noise(rng, 0.65)  # shot noise
        image = 128 + rng.uniform(0.95, 1.3) * (image - 133) + 9 * noise(rng, 70) + rng.normal(0, 6)  # stain, light
        # Like an annotator, paint over slivers that are too thin to be told from membrane.
        brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
        label = cv2.morphologyEx(np.uint8(255) * (border > 1.05 * width), cv2.MORPH_OPEN, brush)
        stack[:, z] = np.clip(image, 0, 255), label
    return stack


def make_sample():
    """{folder: uint8 (N, 256, 256)}: 20 training pairs, 5 test pairs of other tissue."""
    (train_image, train_label), (test_image, test_label) = make_stack(0, 20), make_stack(1, 5)
    return dict(train_image=train_image, train_label=train_label, test_image=test_image, test_label=test_label)
