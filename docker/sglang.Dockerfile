# An SGLang server, started by `agentrl engine serve` with the flags that training needs. From the repository's root:
#   docker build -f docker/sglang.Dockerfile -t agentrl/sglang .
# On a CPU, from any image with Python 3.11 (pip must find a CPU build of torch, or it fetches CUDA's libraries too):
#   docker build -f docker/sglang.Dockerfile -t agentrl/sglang:cpu --build-arg BASE=python:3.11-slim-bookworm \
#     --build-arg DEVICE=cpu --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
ARG BASE=nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04
FROM ${BASE}
ARG DEVICE=cuda
# Where pip looks is the builder's business. An image's history shows build arguments: no secrets in them.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_CERT
# On CUDA kernels are compiled when they are first needed: a compiler and Python's headers belong to the server.
RUN apt-get update -qq \
 && if [ "${DEVICE}" = cuda ]; then more="build-essential ninja-build python3-dev"; fi \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ca-certificates libgomp1 libnuma1 python3 python3-venv ${more:-} \
 && rm -rf /var/lib/apt/lists/*
# What `agentrl engine` imports; the trainer's torch has no place here.
RUN python3 -m venv /opt/agentrl && /opt/agentrl/bin/pip install --no-cache-dir -q "cyclopts>=4" "httpx>=0.28" "numpy>=2" "rich>=13.9"
ENV AGENTRL_CACHE=/opt/cache PYTHONPATH=/opt/src PIP_NO_CACHE_DIR=1
# The servers' environment comes before the rest of the sources: it is made again only where its recipe changed.
COPY agentrl/__init__.py agentrl/cache.py agentrl/errors.py agentrl/content.py agentrl/trajectory.py /opt/src/agentrl/
COPY agentrl/engines/__init__.py agentrl/engines/install.py agentrl/engines/launch.py /opt/src/agentrl/engines/
RUN /opt/agentrl/bin/python -c "import sys; from agentrl.engines.install import install; install('sglang', sys.argv[1], lambda step: sys.stderr.write(step + '\n'))" "${DEVICE}"
COPY agentrl /opt/src/agentrl
RUN (getent group 1000 || groupadd --gid 1000 agentrl) >/dev/null \
 && (getent passwd 1000 || useradd --uid 1000 --gid 1000 --create-home agentrl) >/dev/null \
 && mkdir -p /models /weights /home/engine && chown 1000:1000 /models /weights /home/engine
USER 1000:1000
ENV HOME=/home/engine DEVICE=${DEVICE}
WORKDIR /home/engine
EXPOSE 30000
# /health generates a token; /model_info does not.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
  CMD ["/opt/agentrl/bin/python", "-c", "import httpx; httpx.get('http://127.0.0.1:30000/model_info', timeout=4, trust_env=False).raise_for_status()"]
# Mount the model's folder at /models/policy. More flags for the server may follow as the container's own words.
ENTRYPOINT ["/bin/sh", "-c", "exec /opt/agentrl/bin/python -m agentrl engine serve sglang /models/policy --port 30000 --device \"$DEVICE\" --log /home/engine/server.log -- --host 0.0.0.0 \"$@\"", "serve"]
