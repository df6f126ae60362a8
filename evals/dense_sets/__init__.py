"""Images with a truth for every pixel, by name, in the layouts that users have on disk. Nothing is downloaded.

A tree that is not there, or not whole, is named together with what it should look like. Truths are int64 classes with
IGNORE, or float32 metres with 0 where nothing was measured.
"""

from evals.dense_sets.depth import DepthName, depth_reader, kitti_box, open_depth
from evals.dense_sets.files import LAYOUTS
from evals.dense_sets.items import DenseItem, DenseSet, DenseSetError, FileItem, MaskName, evaluated
from evals.dense_sets.segmentation import SegmentationName, class_reader, open_segmentation

__all__ = [
    "LAYOUTS",
    "DenseItem",
    "DenseSet",
    "DenseSetError",
    "DepthName",
    "FileItem",
    "MaskName",
    "SegmentationName",
    "class_reader",
    "depth_reader",
    "evaluated",
    "kitti_box",
    "open_depth",
    "open_segmentation",
]
