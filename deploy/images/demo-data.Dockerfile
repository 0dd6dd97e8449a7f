# The default run's data under /data, fetched when the image is built: an init container copies it to where a run reads it.
# Bring your own data by an image like this one, or by a volume.
ARG BASE=docker.io/library/python:3.11-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE} AS packages
COPY scripts/image_environment.sh /tools/
COPY requirements/images/build.lock requirements/images/honed.lock /src/requirements/images/
RUN /tools/image_environment.sh packages honed

FROM packages AS build
COPY pyproject.toml README.md LICENSE /src/
COPY services /src/services
RUN /tools/image_environment.sh honed
# By the build's own Python, which has the pip that fetches them.
RUN PYTHONPATH=$(echo /opt/honed/lib/python3*/site-packages) /tmp/tools/bin/python -m honed.cli.main data prepare --to /data

FROM ${BASE}
COPY scripts/image_environment.sh /tmp/
RUN sh /tmp/image_environment.sh bare && rm /tmp/image_environment.sh
COPY --from=build /data /data
USER 65532:65532
ENTRYPOINT ["cp", "-r", "/data/.", "/target/"]
LABEL org.opencontainers.image.title="honed-demo-data" \
      org.opencontainers.image.description="Files of the default run: texts, prompts, comparisons of human ratings"
