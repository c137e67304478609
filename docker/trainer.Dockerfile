# The trainer. From the repository's root: docker build -f docker/trainer.Dockerfile -t agentrl/trainer .
# torch's own wheels bring what they need of CUDA; the driver comes from the host.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}
# Where pip looks is the builder's business. An image's history shows build arguments: no secrets in them.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
WORKDIR /opt/src
COPY constraints.txt ./
RUN python3 -m venv /opt/agentrl \
 && /opt/agentrl/bin/pip install --no-cache-dir -q --constraint constraints.txt hatchling editables torch
COPY . .
RUN /opt/agentrl/bin/pip install --no-cache-dir -q --constraint constraints.txt --no-build-isolation ".[plot]"
RUN (getent group 1000 || groupadd --gid 1000 agentrl) >/dev/null \
 && (getent passwd 1000 || useradd --uid 1000 --gid 1000 --create-home agentrl) >/dev/null \
 && mkdir -p /models /weights /runs /home/trainer && chown 1000:1000 /models /weights /runs /home/trainer
USER 1000:1000
ENV HOME=/home/trainer AGENTRL_CACHE=/home/trainer/cache PATH=/opt/agentrl/bin:$PATH
ENTRYPOINT ["agentrl"]
CMD ["--help"]
