# syntax=docker/dockerfile:1
# Either role with SGLang's model on the CPU, and the router. Nobody has built it yet.
#   docker build -f deploy/containers/cpu.Dockerfile -t sglang-hma-cpu:0.1.0 .
FROM python:3.12-slim-bookworm

# The libraries that Mooncake's engine links to, and a compiler for hma_kernels.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libcurl4 libibverbs1 libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sglang-hma
COPY requirements ./requirements
RUN pip install --no-cache-dir --no-deps -r requirements/cpu.txt -r requirements/build.txt
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY hma_kernels ./hma_kernels
COPY python ./python
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && useradd --uid 10001 --create-home sglang-hma

USER 10001
CMD ["python", "-m", "sglang_hma.launch_server", "--help"]
