from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lslora_fairseq",
    version="0.1.0",
    description="Language-specific LoRA with gradual pruning for multilingual MT: a fairseq plugin",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["lslora_fairseq", "lslora_fairseq.*"]),
    py_modules=["lslora"],
    entry_points={"console_scripts": ["lslora = lslora:main"]},
    python_requires=">=3.10,<3.13",
    install_requires=[
        "torch>=2.2",
        "numpy>=1.24",
        "sentencepiece>=0.1.99",
        "sacrebleu>=2.3",
        "safetensors>=0.4.3",
        # the stock release cannot be imported from Python 3.11 on; ve-fairseq is fairseq's main
        # branch, packaged
        'fairseq>=0.12.2; python_version < "3.11"',
        've-fairseq>=0.12.3; python_version >= "3.11"',
    ],
    extras_require={
        "quickstart": ["polib"],
        "plot": ["matplotlib>=3.8"],
        "mecab": ["sacrebleu[ja,ko]"],
        "langid": ["py3langid>=0.2.2", "langcodes>=3.3"],
        # for those who load what is exported; the commands themselves need neither
        "hf": [
            "transformers==5.24.0; python_version>='3.11'",
            "transformers==4.57.6; python_version<'3.11'",
            "peft==0.21.2",
        ],
        "test": [
            "pytest",
            "pytest-cov",
            "pytest-xdist",
            "filelock",
            "hypothesis",
            "ruff",
            "polib",
            "wtforms",
            "humanize",
            "matplotlib>=3.8",
            "py3langid>=0.2.2",
            "langcodes>=3.3",
            "sacrebleu[ja,ko]",
        ],
    },
)
