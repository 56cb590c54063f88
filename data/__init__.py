"""Data sets held in memory, and the batches drawn from them."""

from data.augmentation import Augmentation
from data.batches import Batches, evaluation_batches
from data.cifar import load_cifar
from data.dataset import Dataset, EvaluationSet, Images
from data.folder import folder_digest, load_evaluation_folder, load_folder
from data.lookup import make_lookup

__all__ = [
    "Augmentation",
    "Batches",
    "Dataset",
    "EvaluationSet",
    "Images",
    "evaluation_batches",
    "folder_digest",
    "load_cifar",
    "load_evaluation_folder",
    "load_folder",
    "make_lookup",
]
