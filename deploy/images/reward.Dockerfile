# The reward service.
# Built by `make images`; the context is the repository's root. Layers go from what seldom changes to what often does.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS packages
# Where the CPU build of torch is found.
ARG PIP_EXTRA_INDEX_URL
COPY scripts/image_environment.sh /tools/
COPY requirements/images/build.lock requirements/images/reward.lock /src/requirements/images/
RUN /tools/image_environment.sh packages reward

FROM packages AS build
COPY pyproject.toml README.md LICENSE /src/
COPY services /src/services
RUN /tools/image_environment.sh honed

FROM ${BASE}
COPY scripts/image_environment.sh /tmp/
RUN sh /tmp/image_environment.sh bare && rm /tmp/image_environment.sh
COPY --from=packages /opt/honed /opt/honed
COPY --from=build /honed/opt/honed /opt/honed
ENV PATH=/opt/honed/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["honed"]
LABEL org.opencontainers.image.title="honed-reward" \
      org.opencontainers.image.description="honed reward: scorers in dynamic batches" \
      org.opencontainers.image.licenses="Apache-2.0"
