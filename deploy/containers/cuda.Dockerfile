# syntax=docker/dockerfile:1
# Decode on NVIDIA GPUs, prefill too, with CUDA 13 from wheels; the host brings the driver and NVIDIA's
# container toolkit. Nobody has built it yet.
#   docker build -f deploy/containers/cuda.Dockerfile -t sglang-hma-cuda:0.1.0 .
FROM python:3.12-slim-bookworm

# The libraries that Mooncake's engine links to, providers for RDMA, and the compiler that nvcc, Triton
# and hma_kernels use; the first two also when a server runs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ ibverbs-providers libcurl4 libibverbs1 libnuma1 librdmacm1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sglang-hma
COPY requirements ./requirements
RUN pip install --no-cache-dir --no-deps -r requirements/cuda.txt -r requirements/build.txt
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY hma_kernels ./hma_kernels
COPY python ./python
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && useradd --uid 10001 --create-home sglang-hma

ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001
CMD ["python", "-m", "sglang_hma.launch_server", "--help"]
