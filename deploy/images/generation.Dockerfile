# Generation: vLLM. `--build-arg DEVICE=cuda` for GPUs.
# Built by `make images`; the context is the repository's root. Layers go from what seldom changes to what often does.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS packages
ARG DEVICE=cpu
# Where the CPU build of torch is found.
ARG PIP_EXTRA_INDEX_URL
COPY scripts/image_environment.sh /tools/
COPY requirements/images/build.lock requirements/images/generation-${DEVICE}.lock /src/requirements/images/
RUN /tools/image_environment.sh packages generation-${DEVICE}

FROM packages AS build
COPY pyproject.toml README.md LICENSE /src/
COPY services /src/services
RUN /tools/image_environment.sh honed

FROM ${BASE}
ARG DEVICE=cpu
COPY scripts/image_environment.sh /tmp/
RUN sh /tmp/image_environment.sh bare && rm /tmp/image_environment.sh
# vLLM's part for CPUs is linked with libnuma, which no Python package brings. On GPUs Triton compiles a stub in C for each of its
# kernels where it first runs, with Python's headers: this image alone has a compiler.
RUN apt-get update \
    && case "${DEVICE}" in \
        cpu) packages=libnuma1 ;; \
        *) packages="gcc libc6-dev"; python3 -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' \
            2>/dev/null || packages="${packages} libpython3-dev" ;; \
    esac \
    && apt-get install -y --no-install-recommends ${packages} && rm -rf /var/lib/apt/lists /var/cache/apt
COPY --from=packages /opt/honed /opt/honed
# What does not load is told here, not in a pod. vLLM chooses the library for the processor at hand: the wrong one ends the process.
RUN [ "${DEVICE}" != cpu ] || /opt/honed/bin/python -B -c \
    'import torch; from vllm.platforms import current_platform as cpu; cpu.import_kernels(); torch.ops._C.rms_norm'
COPY --from=build /honed/opt/honed /opt/honed
ENV PATH=/opt/honed/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT=/tmp/vllm
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["honed"]
LABEL org.opencontainers.image.title="honed-generation" \
      org.opencontainers.image.description="honed generation: vLLM behind gRPC, weights exchanged while it serves" \
      org.opencontainers.image.licenses="Apache-2.0"
