"""Clusters by name or from a file: what a rank can compute, hold and send."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megakd.common.errors import UserError, naming, nearest
from megakd.config.load import read_mapping
from megakd.config.problems import first_problem

_PRICES = "US dollars per GPU and hour: an assumption, as prices differ; give --price-per-gpu-hour."


class Cluster(BaseModel):
    """A cluster of equal nodes. Vendors' peak figures, and what part of them a run is taken to reach."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = "cluster"
    device: str = Field(default="GPU", description="Name of the device.")
    device_type: Literal["cuda", "cpu"] = "cuda"
    ranks_per_node: int = Field(default=8, gt=0, description="Devices, each a rank.")
    memory_gib: float = Field(gt=0, description="Of a device.")
    bf16_tflops: float = Field(gt=0, description="Peak of dense products, 1e12 operations per second.")
    fp32_tflops: float = Field(gt=0, description="Peak of dense products as torch runs them by default, without TF32.")
    memory_gb_per_s: float = Field(gt=0, description="Bandwidth of the device's memory.")
    link_gb_per_s: float = Field(gt=0, description="Between devices of a node, per device and direction.")
    network_gb_per_s: float = Field(gt=0, description="Between nodes, per device and direction.")
    price_per_gpu_hour: float = Field(default=0.0, ge=0, description=_PRICES)
    product_efficiency: float = Field(default=0.6, gt=0, le=1, description="Part of the peak that products reach.")
    transfer_efficiency: float = Field(default=0.75, gt=0, le=1, description="Part of the bandwidths that is reached.")
    reserved_gib: float = Field(
        default=0.0, ge=0, description="Of a device's memory, for the driver, NCCL and the allocator's gaps."
    )

    def tflops(self, element_size: int) -> float:
        """Peak rate of products of elements of so many bytes."""
        return self.bf16_tflops if element_size == 2 else self.fp32_tflops


def _gpu(name: str, device: str, memory: float, bf16: float, fp32: float, hbm: float, link: float, network: float,
         price: float) -> Cluster:  # fmt: skip
    # The driver and NCCL take 2 to 3 GiB, and a caching allocator leaves gaps.
    return Cluster(
        name=name, device=device, memory_gib=memory, bf16_tflops=bf16, fp32_tflops=fp32, memory_gb_per_s=hbm,
        link_gb_per_s=link, network_gb_per_s=network, price_per_gpu_hour=price, reserved_gib=0.08 * memory,
    )  # fmt: skip


# Peak figures from the vendor's data sheets, without sparsity; one 400 Gb/s (Ampere: 200) network card per GPU.
CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        _gpu("a100-40gb", "NVIDIA A100 SXM 40 GB", 39.4, 312, 19.5, 1555, 300, 25, 1.5),
        _gpu("a100", "NVIDIA A100 SXM 80 GB", 79.2, 312, 19.5, 2039, 300, 25, 2.0),
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 79.2, 989, 67, 3350, 450, 50, 3.0),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 139.8, 989, 67, 4800, 450, 50, 3.8),
        _gpu("b200", "NVIDIA B200 SXM 180 GB", 178, 2250, 75, 7700, 900, 50, 6.0),
        _gpu("l40s", "NVIDIA L40S 48 GB", 44.4, 362, 91, 864, 32, 12.5, 1.0),
        _gpu("rtx4090", "NVIDIA RTX 4090 24 GB", 23.6, 165, 82, 1008, 32, 3, 0.4),
    )
}


def load_cluster(name: str, ranks_per_node: int | None = None) -> Cluster:
    """The cluster of this name, that a YAML file of this path describes, or this machine (`local`).

    Args:
        ranks_per_node: in place of the cluster's own; the ranks of a machine without GPU share its cores and memory.

    Raises:
        UserError: there is none, or the file does not describe one.
    """
    path = Path(name)
    if name == "local":
        # Measuring takes torch and a second.
        from megakd.planning.local_cluster import measure_local_cluster

        return measure_local_cluster(ranks_per_node)
    if name in CLUSTERS:
        cluster = CLUSTERS[name]
    elif path.suffix in (".yaml", ".yml") or path.is_file():
        cluster = _read_cluster(path)
    else:
        raise UserError(
            f"--cluster is '{name}'; it must be one of {', '.join(CLUSTERS)} and local, or a YAML file that describes "
            f"one (docs/planning.md).{nearest(name, [*CLUSTERS, 'local'])}"
        )
    return cluster if ranks_per_node is None else cluster.model_copy(update={"ranks_per_node": ranks_per_node})


def _read_cluster(path: Path) -> Cluster:
    with naming("--cluster"):
        values = {"name": path.stem, **read_mapping(path, "a cluster's keys")}
        try:
            cluster = Cluster.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{path}: {first_problem(error, values, Cluster)}") from error
        if cluster.reserved_gib >= cluster.memory_gib:
            raise UserError(
                f"{path}: reserved_gib is {cluster.reserved_gib:g}; it must be below memory_gib, "
                f"{cluster.memory_gib:g}."
            )
        return cluster
