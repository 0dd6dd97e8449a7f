#!/bin/sh
# The steps of an image's build, the same in all of deploy/images/*.Dockerfile.
#
#   packages LOCK   a virtual environment in /opt/honed with what requirements/images/LOCK.lock pins
#   honed           honed itself into it, and a list of all packages (CycloneDX) beside it
#   bare            removes from a base image what only builds need
set -eu
tools=/tmp/tools

case $1 in
packages)
    python3 -m venv "$tools"
    # What the build needs stays in the build: the environment itself has no pip.
    "$tools/bin/pip" install --quiet --no-cache-dir 'pip>=23.1' 'setuptools>=75' wheel 'cyclonedx-bom>=6,<8'
    python3 -m venv --without-pip /opt/honed
    "$tools/bin/pip" --python /opt/honed/bin/python install --quiet --no-cache-dir --no-deps --only-binary=:all: \
        -r "/src/requirements/images/$2.lock"
    ;;
honed)
    "$tools/bin/pip" wheel --quiet --no-deps --no-build-isolation -w "$tools/wheels" /src
    "$tools/bin/pip" --python /opt/honed/bin/python install --quiet --no-cache-dir --no-deps --no-index "$tools"/wheels/honed-*.whl
    mkdir -p /opt/honed/share
    "$tools/bin/cyclonedx-py" environment --output-reproducible -o /opt/honed/share/sbom.cdx.json /opt/honed/bin/python
    ;;
bare)
    python3 -c 'import shutil, sys, sysconfig
for scheme in ("purelib", "platlib"):
    for name in ("pip", "setuptools", "wheel", "_distutils_hack", "pkg_resources"):
        shutil.rmtree(f"{sysconfig.get_path(scheme)}/{name}", ignore_errors=True)
shutil.rmtree(f"{sysconfig.get_path(\"stdlib\")}/ensurepip", ignore_errors=True)'
    rm -rf /usr/lib/python3/dist-packages/pip /usr/lib/python3/dist-packages/setuptools /usr/share/python-wheels \
        /usr/local/bin/pip* /usr/bin/pip* /var/cache/apt /var/lib/apt/lists
    if command -v pip pip3 gcc cc >/dev/null 2>&1; then
        echo "the base image carries a compiler or pip that this step does not know how to remove" >&2
        exit 1
    fi
    ;;
*)
    echo "usage: $0 packages LOCK | honed | bare" >&2
    exit 2
    ;;
esac
