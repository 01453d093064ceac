"""Package metadata; tools/requirements/ pins the versions that are tested."""

from pathlib import Path

from setuptools import find_packages, setup

# tools/check_requirements.py reads the two lists below.
INSTALL_REQUIRES = [
    "torch>=2.8",
    "megatron-core>=0.16,<0.17",
    # megatron-core needs these two and does not declare them.
    "psutil>=5.9",
    "einops>=0.8",
    "transformers>=5.0,<6",
    "tokenizers>=0.22",
    # For chat templates; transformers takes no older one.
    "jinja2>=3.1.6",
    "sentencepiece>=0.2",
    "safetensors>=0.6",
    "numpy>=1.26,<3",
    "pydantic>=2.10,<3",
    "PyYAML>=6.0",
    "rich>=13.0",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
    "pyarrow>=18.0",
]
DEV_REQUIRES = [
    "pytest>=8.0",
    # Runs two files of tests at a time.
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "mypy>=1.15",
    "types-PyYAML>=6.0",
    # Comes with CUDA builds of torch; here to run the kernels in its interpreter.
    "triton>=3.6",
    # Optional where a run is to appear on Weights & Biases; its offline mode is tested.
    "wandb>=0.31",
]
WANDB_REQUIRES = ["wandb>=0.31"]
# NVIDIA Apex (fused Adam and norms) is installed from NVIDIA's source repository: the package called `apex` on PyPI
# is another project.
GPU_REQUIRES = ["transformer-engine[pytorch]>=2.0"]

root = Path(__file__).parent
version: dict[str, str] = {}
exec((root / "megakd" / "_version.py").read_text(encoding="utf-8"), version)
readme = root / "README.md"

setup(
    name="megakd",
    version=version["__version__"],
    description="Distil large GPT models into smaller ones with Megatron-style parallelism",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megakd", "megakd.*"]),
    package_data={"megakd": ["py.typed", "report/page.css", "report/page.js"]},
    install_requires=INSTALL_REQUIRES,
    extras_require={"gpu": GPU_REQUIRES, "wandb": WANDB_REQUIRES, "dev": DEV_REQUIRES},
    entry_points={"console_scripts": ["megakd=megakd.cli.main:main"]},
)
