"""Packaging of advtransfer; the tested versions are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "advtransfer/__init__.py").read_text())[1]

# Object stores that run on one machine, and the clients that tests reach them with.
BUCKETS = ["flask-cors>=5", "gcp-storage-emulator>=2024.8", "gcsfs>=2025.2", "moto[s3]>=5", "s3fs>=2025.2"]

setup(
    name="advtransfer",
    version=VERSION,
    description="Robust transfer learning in JAX",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["advtransfer", "advtransfer.*"]), "advtransfer.experiments"],
    package_dir={"advtransfer.experiments": "experiments"},
    package_data={
        "advtransfer": ["py.typed"],
        "advtransfer.report": ["templates/*.html", "*.csv"],
        "advtransfer.torch_checkpoint": ["known_models.csv"],
        "advtransfer.torch_reader": ["README.md"],
    },
    entry_points={"console_scripts": ["advtransfer = advtransfer.main:run"]},
    install_requires=[
        "absl-py>=2.1",
        "chex>=0.1.90",
        "etils[epath]>=1.12",
        "flatbuffers>=24",  # jax.export writes files with it
        "flax>=0.12",
        "fsspec>=2025.2",
        "grain>=0.2.15",
        "importlib_resources>=6",  # tensorflow-datasets reads prepared sets through it
        "jax>=0.10",
        "jaxtyping>=0.3",
        "jinja2>=3.1",
        "matplotlib>=3.9",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pandas>=2.2",
        "pillow>=11",
        "psutil>=5.9",
        "safetensors>=0.5",
        "scikit-learn>=1.6",
        "scipy>=1.14",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
        "tfds-prepare": ["tensorflow>=2.18"],  # to prepare sets; to read them nothing is needed
        "hub": ["huggingface_hub>=0.30"],
        "parquet": ["pyarrow>=18"],
        "ray": ["ray>=2.50"],
        "gcs": ["gcsfs>=2025.2"],
        "s3": ["s3fs>=2025.2"],
        "docs": ["sphinx>=8", "myst-nb>=1.3", "sphinx-book-theme>=1.1", "sphinx-copybutton>=0.5"],
        "test": [
            "beartype>=0.22",
            "coverage>=7.6",
            "huggingface_hub>=1.0",
            "pyarrow>=18",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "ray>=2.50",
            "ruff>=0.14",
            "setuptools>=77",
            "ty==0.0.107",
            *BUCKETS,
        ],
        "bench": ["torch==2.13.0", "pyautoattack==0.2.0"],
    },
)
