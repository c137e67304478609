# The sandbox's image with Debian's Chromium, for GUI environments. `agentrl sandbox build --browser` makes it.
ARG BASE_IMAGE=agentrl/sandbox
FROM ${BASE_IMAGE}
USER root
RUN apt-get update -qq \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core \
 && rm -rf /var/lib/apt/lists/*
USER 1000:1000
