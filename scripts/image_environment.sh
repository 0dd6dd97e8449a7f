#!/bin/sh
# The steps of an image's build, the same in all of deploy/images/*.Dockerfile.
#
#   packages LOCK   a virtual environment in /opt/honed with what requirements/images/LOCK.lock pins, by the tools of build.lock
#   honed           honed itself into it, with a list of all packages (CycloneDX); the same files alone below /honed
#   bare            removes from a base image what only builds need
set -eu
tools=/tmp/tools

case $1 in
packages)
    python3 -m venv "$tools"
    # What the build needs stays in the build: the environment itself has no pip.
    "$tools/bin/pip" install --quiet --no-cache-dir --no-deps --only-binary=:all: -r /src/requirements/images/build.lock
    python3 -m venv --without-pip /opt/honed
    "$tools/bin/pip" --python /opt/honed/bin/python install --quiet --no-cache-dir --no-deps --only-binary=:all: \
        --no-compile -r "/src/requirements/images/$2.lock"
    # What no service reads, 75 MB: a class for every call of Kubernetes' API (honed speaks JSON by path, and names none), and
    # the descriptions of Amazon's services, of which a bucket and its credentials need these.
    for site in /opt/honed/lib/python3*/site-packages; do
        rm -f "$site"/kubernetes/client/api/*_api.py "$site"/kubernetes/aio/client/api/*_api.py
        find "$site/botocore/data" -mindepth 1 -maxdepth 1 -type d \
            ! -name s3 ! -name sts ! -name sso ! -name sso-oidc ! -name signin -exec rm -rf {} +
    done
    # Bytecode is made here, since the root is read-only where it runs; none for Kubernetes' thousand models, another 20 MB.
    # The status does not count: some packages carry templates that end in .py and are no Python.
    /opt/honed/bin/python -m compileall -q -j 0 -x '/kubernetes/(aio/)?client/models/' /opt/honed/lib >/dev/null || true
    # The lock pins 2.13.0, and an index may have that with and without the libraries of a GPU: say it here, not in a pod.
    if grep -q '^torch==' "/src/requirements/images/$2.lock"; then
        /opt/honed/bin/python -B -c 'import torch' || {
            echo "torch does not load: give pip an index with its CPU build (--build-arg PIP_EXTRA_INDEX_URL=...)" >&2
            exit 1
        }
    fi
    ;;
honed)
    "$tools/bin/pip" wheel --quiet --no-deps --no-build-isolation -w "$tools/wheels" /src
    for root in / /honed; do
        "$tools/bin/pip" --python /opt/honed/bin/python install --quiet --no-cache-dir --no-deps --no-index --ignore-installed \
            --root "$root" "$tools"/wheels/honed-*.whl
    done
    mkdir -p /honed/opt/honed/share
    "$tools/bin/cyclonedx-py" environment --output-reproducible -o /honed/opt/honed/share/sbom.cdx.json /opt/honed/bin/python
    ;;
bare)
    python3 - <<'END'
import shutil
import sysconfig

for scheme in ("purelib", "platlib"):
    for name in ("pip", "setuptools", "wheel", "_distutils_hack", "pkg_resources"):
        shutil.rmtree(f"{sysconfig.get_path(scheme)}/{name}", ignore_errors=True)
shutil.rmtree(f"{sysconfig.get_path('stdlib')}/ensurepip", ignore_errors=True)
END
    rm -rf /usr/lib/python3/dist-packages/pip /usr/lib/python3/dist-packages/setuptools /usr/share/python-wheels \
        /usr/local/bin/pip* /usr/bin/pip* /var/cache/apt /var/lib/apt/lists
    for program in pip pip3 gcc cc c++ clang; do
        if command -v "$program" >/dev/null; then
            echo "the base image carries $program, and this step does not know how to remove it" >&2
            exit 1
        fi
    done
    if python3 -c 'import pip' 2>/dev/null; then
        echo "the base image carries pip where this step does not look for it" >&2
        exit 1
    fi
    ;;
*)
    echo "usage: $0 packages LOCK | honed | bare" >&2
    exit 2
    ;;
esac
