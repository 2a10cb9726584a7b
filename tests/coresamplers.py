"""ComfyUI's samplers: for the cases inside it, and for the tests that read what they found."""

from __future__ import annotations

WORKING = (
    "euler", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "ipndm", "deis", "gradient_estimation", "ipndm_v",
    "res_multistep", "exp_heun_2_x0",
)  # fmt: skip
ADDING = (
    "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun",
    "dpmpp_3m_sde", "ddpm", "res_multistep_ancestral", "exp_heun_2_x0_sde", "er_sde", "seeds_2", "seeds_3", "sa_solver",
    "sa_solver_pece",
)  # fmt: skip
OTHERS = ("dpmpp_2m_cfg_pp", "euler_ancestral_cfg_pp", "dpm_fast", "dpm_adaptive", "uni_pc", "lcm")
