"""Packaging that reads settings.ini, the one configuration file of the project."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    url=cfg["git_url"],
    # The manifests (published numbers, data sets) live at the top of the repository and travel inside the wheel; so do the two notebooks
    # that `radrepro tables` and `radrepro figures` run.
    packages=find_packages(include=["radrepro", "radrepro.*"]) + ["radrepro.data_manifests", "radrepro.notebooks"],
    package_dir={"radrepro.data_manifests": "data_manifests", "radrepro.notebooks": "nbs"},
    package_data={"radrepro.data_manifests": ["*.csv", "*.toml"], "radrepro.notebooks": ["tables.ipynb", "figures.ipynb"]},
    include_package_data=False,
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "dose": cfg["dose_requirements"].split(),
                    "data": cfg["data_requirements"].split(), "seg": cfg["seg_requirements"].split()},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
    ],
    python_requires=">=" + cfg["min_python"],
    keywords=cfg["keywords"].split(),
    entry_points={"nbdev": ["radrepro=radrepro._modidx:d"], "console_scripts": ["radrepro=radrepro.cli.main:main"]},
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
)
