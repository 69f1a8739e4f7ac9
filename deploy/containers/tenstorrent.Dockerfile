# syntax=docker/dockerfile:1
# Prefill on Tenstorrent cards: the CPU image, which has ttnn, with the vendor's compiler for it; the
# host brings the driver (tt-kmd). Nobody has built it yet.
#   docker build -f deploy/containers/tenstorrent.Dockerfile -t sglang-hma-tenstorrent:0.1.0 .
ARG BASE=sglang-hma-cpu:0.1.0
FROM ${BASE}

# Release and hash are those of ttnn's file tt_metal/sfpi-version.
ARG SFPI=7.89.0
ARG SFPI_SHA256=c4cdc162aff014dcd3107fdcdcb8807e4128a551897688324a79164aa418f850
USER 0
ADD --checksum=sha256:${SFPI_SHA256} \
    https://github.com/tenstorrent/sfpi/releases/download/${SFPI}/sfpi_${SFPI}_x86_64_debian.deb /tmp/sfpi.deb
RUN apt-get update \
    && apt-get install -y --no-install-recommends /tmp/sfpi.deb \
    && rm -rf /var/lib/apt/lists/* /tmp/sfpi.deb
USER 10001
