"""Which rows read which source.

Knows the index's contract and what may be read of it on the host; does not know attention.
"""

from torch import Tensor


def count_rows(image_index: Tensor, num_images: int) -> list[int]:
    """How many rows read each source. On CPU only: reading a CUDA tensor would wait for the device.

    Raises:
        ValueError: image_index is not sorted, or reaches outside of [0, num_images).
    """
    index = image_index.tolist()
    counts = [0] * num_images
    previous = 0
    for row, image in enumerate(index):
        if not 0 <= image < num_images:
            raise ValueError(f"image_index[{row}] is {image}; wanted 0 to {num_images - 1}, the images given")
        if image < previous:
            raise ValueError(f"image_index[{row}] is {image} after {previous}; wanted rows sorted by image")
        previous = image
        counts[image] += 1
    return counts


def check_index(image_index: Tensor, num_images: int) -> None:
    """`count_rows`'s errors where they can be found without waiting for a device."""
    if image_index.device.type == "cpu":
        count_rows(image_index, num_images)
