"""Metadata and the folder map: `modeling_syncmask/` is `syncmask` itself, every other room `syncmask.<room>`."""

from pathlib import Path

from setuptools import setup

EXTRAS = {
    "lora": ["peft>=0.21"],
    "fashiongen": ["h5py>=3.16"],
    "search": ["lancedb>=0.40"],
    "app": ["lancedb>=0.40", "gradio>=6.31"],
    "export": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32"],
    "openvino": ["onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.32", "openvino>=2026.4"],
}
# Measured beside ours by `python -m benchmarks.peers`, for the record; nothing else needs them.
PEERS = ["faiss-cpu>=1.15", "usearch>=2.26", *EXTRAS["openvino"]]
# Nothing is skipped for want of a package, so the tests need all of them.
TEST = ["pytest>=9.2", "playwright>=1.65", *sorted({package for extra in EXTRAS.values() for package in extra})]

ROOMS = ["processing", "evaluation", "training", "retrieval", "hub_cards"]

setup(
    name="syncmask",
    version="0.1.0.dev0",
    description="SyncMask: synchronized attentional masking for fashion vision-language pretraining",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # Listed by hand: a package finder would install `training` and `processing` as top-level names.
    packages=["syncmask", *(f"syncmask.{room}" for room in ROOMS)],
    package_dir={"syncmask": "modeling_syncmask", **{f"syncmask.{room}": room for room in ROOMS}},
    package_data={
        "syncmask": ["py.typed"],
        "syncmask.evaluation": ["evaluate_modules/*/*.py"],
        "syncmask.training": ["configs/*.yaml"],
        "syncmask.hub_cards": ["templates/*.md"],
    },
    install_requires=[
        "torch>=2.13",
        "transformers>=5.20,<6",
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "huggingface_hub>=2.4,<3",
        "safetensors>=0.8",
        "pillow>=12.0",
        "imagehash>=4.3.2",
        "numpy>=2.4",
        "scipy>=1.17",
        "matplotlib>=3.11",
        "jinja2>=3.1",
        "pyyaml>=6.0",
        "typer>=0.29",
        "tqdm>=4.70",
        "psutil>=7.0",
    ],
    extras_require={**EXTRAS, "bench-peers": PEERS, "test": TEST, "dev": [*TEST, "ruff>=0.17", "pre-commit>=4.0"]},
    entry_points={"console_scripts": ["syncmask = syncmask.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
