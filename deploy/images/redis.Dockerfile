# Redis 7 out of Debian, for clusters that can pull nothing: `make images` makes all that overlays/local-cpu needs.
# Built by `make images`; the context is the repository's root.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE}
COPY scripts/image_environment.sh /tmp/
# The package redis-tools has the server's program too, under another name; redis-server would start a service.
RUN apt-get update && apt-get install -y --no-install-recommends redis-tools \
    && ln -s redis-check-rdb /usr/bin/redis-server \
    && sh /tmp/image_environment.sh bare && rm /tmp/image_environment.sh
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["redis-server"]
LABEL org.opencontainers.image.title="honed-redis" \
      org.opencontainers.image.description="Redis as Debian builds it" \
      org.opencontainers.image.licenses="BSD-3-Clause"
