# The sandbox's image. `agentrl sandbox build` makes it: it puts the packages of sandboxes/requirements.txt, chosen for the
# base image's Python, into packages/, so that nothing is fetched from the network while the image is built.
ARG BASE_IMAGE=python:3.12-slim
FROM ${BASE_IMAGE}
RUN (getent group agent || groupadd --gid 1000 agent) >/dev/null \
 && (getent passwd agent || useradd --uid 1000 --gid 1000 --home-dir /workspace --no-create-home --shell /bin/sh agent) >/dev/null \
 && mkdir -p /workspace /run/agentrl && chown 1000:1000 /workspace
COPY packages/ /opt/agentrl/packages/
# The root is read-only when programs run, so nobody could keep bytecode then: an import of sympy would take seconds.
RUN python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/agentrl/packages \
 && python3 -c "import compileall, os; compileall.compile_dir(os.path.dirname(os.__file__), quiet=2, workers=0)"
ENV PYTHONPATH=/opt/agentrl/packages PYTHONDONTWRITEBYTECODE=1
WORKDIR /workspace
USER 1000:1000
CMD ["python3"]
