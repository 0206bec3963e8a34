"""The table of variants: papers, and one entry for each variant.

To add a variant, add a paper to `PAPERS` and an entry to `ENTRIES`, beside its relatives, and a
card to `samx.catalog.cards.CARDS`.
"""

import textwrap
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from samx.catalog import docstrings
from samx.catalog.bibliography import bibtex
from samx.catalog.cards import CARDS
from samx.policies.perturb_if import perturb_if
from samx.variants.adasam import adasam
from samx.variants.ae_sam import ae_looksam, ae_sam
from samx.variants.arsam import arsam
from samx.variants.arwp import arwp, marwp
from samx.variants.asam import asam
from samx.variants.async_sam import async_sam
from samx.variants.ausam import ausam
from samx.variants.bi_lora import bi_lora
from samx.variants.bisam import bisam
from samx.variants.bsam import bsam
from samx.variants.cr_sam import cr_sam
from samx.variants.eigen_sam import eigen_sam
from samx.variants.esam import esam
from samx.variants.fisher_sam import fisher_sam
from samx.variants.flat_lora import flat_lora
from samx.variants.focal_sam import focal_sam
from samx.variants.friendly_sam import friendly_sam
from samx.variants.functional_sam import functional_sam
from samx.variants.gam import gam, gam_exact
from samx.variants.gcsam import gcsam
from samx.variants.gnp import gnp
from samx.variants.gsam import gsam
from samx.variants.imbalanced_sam import imbalanced_sam
from samx.variants.ksam import ksam
from samx.variants.le_sam import le_sam
from samx.variants.lets import lets
from samx.variants.lightsam import lightsam_adagrad, lightsam_adam, lightsam_norm
from samx.variants.logits_sam import logits_sam
from samx.variants.lookbehind_sam import lookbehind_sam
from samx.variants.looksam import look_layer_sam, looksam
from samx.variants.lpf_sgd import lpf_sgd
from samx.variants.lsam import lsam
from samx.variants.mesa import mesa
from samx.variants.momentum_sam import momentum_sam
from samx.variants.monge_sam import monge_sam
from samx.variants.msam import msam
from samx.variants.mup_sam import mup_sam
from samx.variants.rwp import rwp
from samx.variants.saf import saf
from samx.variants.sagm import sagm
from samx.variants.sam import sam, sharpness_aware
from samx.variants.sam_on import sam_on
from samx.variants.sam_polyak import sam_polyak
from samx.variants.sampa import sampa
from samx.variants.sassha import msassha, sassha
from samx.variants.sl_sam import sl_sam
from samx.variants.sparse_sam import dynamic_sparse_sam, fisher_sparse_sam
from samx.variants.spectral_sam import spectral_sam
from samx.variants.stable_sam import stable_sam
from samx.variants.tsam import tsam
from samx.variants.unified_sam import unified_sam
from samx.variants.usam import usam
from samx.variants.vsam import vsam
from samx.variants.wsam import coupled_wsam, wsam
from samx.variants.x_sam import x_sam
from samx.variants.xsam import xsam
from samx.variants.zsharp import zsharp

LOSS = ("value_fn",)
LOSSES = ("losses_fn", "batch")
LOGITS = ("apply_fn", "loss_on_logits", "batch")
SHAPES = {
    "chain": "first in a chain",
    "wraps": "wraps the base",
    "optimizer": "is the optimizer",
}


class Entry(NamedTuple):
    """A row of the catalog.

    Attributes:
        name: The name that `samx.catalog` finds it by.
        factory: The function that builds it.
        call: How it is called, in a typical case.
        method: What the paper calls it.
        paper: Title of the paper.
        authors: Its authors as BibTeX wants them: "Foret, Pierre and Kleiner, Ariel and ...".
        venue: Where it was published; empty for a preprint.
        year: When.
        arxiv: Its arXiv number.
        key: Its BibTeX key.
        shape: "chain" stands first in an `optax.chain`, "wraps" takes the base optimizer as its
            first argument, "optimizer" has no base.
        closures: The keywords of `update` that it requires.
        gradients: Its cost per step, in gradients over one batch, the caller's included.
        state: What its state holds beside the base's, in copies P of the parameters; scalars do not
            count.
        fidelity: What it was compared with, and how far they agree.
        evidence: "authors" if that is the authors' code; "others" if it is somebody else's, an
            independent implementation or a definition; "reconstructed" if the rule had gaps.

    Example:
        >>> import samx
        >>> entry, = samx.catalog("asam")
        >>> entry.method, entry.year, entry.closures
        ('ASAM', 2021, ('value_fn',))
        >>> tx = entry.factory(rho=0.5)
    """

    name: str
    factory: Callable[..., Any]
    call: str
    method: str
    paper: str
    authors: str
    venue: str
    year: int
    arxiv: str
    key: str
    shape: Literal["chain", "wraps", "optimizer"]
    closures: tuple[str, ...]
    gradients: str
    state: str
    fidelity: str
    evidence: Literal["authors", "others", "reconstructed"]

    @property
    def url(self) -> str:
        """The address of the paper."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def published(self) -> str:
        """Where and when the paper was published: "CVPR 2022", or "arXiv 2025"."""
        return f"{self.venue or 'arXiv'} {self.year}"

    def bibtex(self) -> str:
        """Return the BibTeX entry of the paper.

        Example:
            >>> import samx
            >>> print(samx.catalog("looksam")[0].bibtex())
            @inproceedings{liu2022looksam,
              title = {{Towards Efficient and Scalable Sharpness-Aware Minimization}},
              author = {Liu, Yong and Mai, Siqi and Chen, Xiangning and Hsieh, Cho-Jui and You, Yang},
              booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
              year = {2022},
              eprint = {2203.02714},
              archivePrefix = {arXiv},
              url = {https://arxiv.org/abs/2203.02714},
            }
        """
        return bibtex(self)

    def formula(self) -> str:
        """Return the update rule: the first indented block of the factory's docstring.

        Example:
            >>> import samx
            >>> print(samx.catalog("usam")[0].formula())
            g   = ∇L(w)          (the incoming updates)
            ε   = ρ g
            g_s = ∇L(w + ε)
            return g_s
        """
        return CARDS[self.name].formula or docstrings.formula(self.factory)

    def doubts(self) -> str:
        """Return what the factory's docstring adds to `fidelity`; empty if nothing.

        Example:
            >>> import samx
            >>> samx.catalog("arsam")[0].doubts()[:41]
            'The announced code could not be obtained.'
        """
        if CARDS[self.name].formula:  # the factory is of policies, not of this paper
            return ""
        return docstrings.doubts(self.factory)

    def card(self) -> str:
        """Return the method card as plain text: when to use it, its rule, cost and first rho.

        Example:
            >>> import samx
            >>> print(samx.catalog("usam")[0].card())  # doctest: +ELLIPSIS
            usam: USAM, un-normalized SAM (ICML 2022)
            ...
        """
        card = CARDS[self.name]
        paragraphs = [
            f"Use when: {card.use_when}",
            f"Not when: {card.not_when}",
            f"Cost: gradients per step: {self.gradients}; held in the state: {self.state} (P: one "
            "copy of the parameters).",
            f"Needs: {', '.join(self.closures)} in `update`; {SHAPES[self.shape]}.",
            "Start with rho:",
            *(f"  {start}" for start in card.start),
            f"Watch: {card.watch}",
            f"Fidelity: {docstrings.plain(self.fidelity)}",
        ]
        for code, arguments in card.coming_from.items():
            paragraphs.append(f"Coming from {code}:")
            paragraphs += [f"  {theirs} -> {ours}" for theirs, ours in arguments.items()]
        wrapped = (
            textwrap.fill(
                paragraph,
                80,
                subsequent_indent="    " if paragraph.startswith(" ") else "  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
            for paragraph in paragraphs
        )
        head = f"{self.name}: {self.method} ({self.published})\n{self.call}\n"
        return "\n".join([head, textwrap.indent(self.formula(), "    "), "", *wrapped])


class _Paper(NamedTuple):
    title: str
    authors: str
    venue: str
    year: int
    arxiv: str


# fmt: off
PAPERS = {
    "foret2021sharpness": _Paper(
        "Sharpness-Aware Minimization for Efficiently Improving Generalization",
        "Foret, Pierre and Kleiner, Ariel and Mobahi, Hossein and Neyshabur, Behnam",
        "ICLR", 2021, "2010.01412"),
    "kwon2021asam": _Paper(
        "ASAM: Adaptive Sharpness-Aware Minimization for Scale-Invariant Learning of Deep Neural Networks",
        "Kwon, Jungmin and Kim, Jeongseop and Park, Hyunseo and Choi, In Kwon",
        "ICML", 2021, "2102.11600"),
    "xie2024sampa": _Paper(
        "SAMPa: Sharpness-aware Minimization Parallelized",
        "Xie, Wanyun and Pethick, Thomas and Cevher, Volkan",
        "NeurIPS", 2024, "2410.10683"),
    "liu2022looksam": _Paper(
        "Towards Efficient and Scalable Sharpness-Aware Minimization",
        "Liu, Yong and Mai, Siqi and Chen, Xiangning and Hsieh, Cho-Jui and You, Yang",
        "CVPR", 2022, "2203.02714"),
    "zhao2023randomized": _Paper(
        "Randomized Sharpness-Aware Training for Boosting Computational Efficiency in Deep Learning",
        "Zhao, Yang and Zhang, Hao and Hu, Xiuyuan",
        "AAAI", 2023, "2203.09962"),
    "jiang2023adaptive": _Paper(
        "An Adaptive Policy to Employ Sharpness-Aware Minimization",
        "Jiang, Weisen and Yang, Hansi and Zhang, Yu and Kwok, James",
        "ICLR", 2023, "2304.14647"),
    "deng2024vsam": _Paper(
        "Effective Gradient Sample Size via Variation Estimation for Accelerating Sharpness aware Minimization",
        "Deng, Jiaxin and Pang, Junbiao and Zhang, Baochang and Wang, Tian",
        "", 2024, "2403.08821"),
    "deng2025arsam": _Paper(
        "Adaptively Sampling-Reusing-Mixing Decomposed Gradients to Speed Up Sharpness Aware Minimization",
        "Deng, Jiaxin and Pang, Junbiao",
        "", 2025, "2510.03763"),
    "ni2022ksam": _Paper(
        "K-SAM: Sharpness-Aware Minimization at the Speed of SGD",
        "Ni, Renkun and Chiang, Ping-yeh and Geiping, Jonas and Goldblum, Micah and Wilson, Andrew Gordon and Goldstein, Tom",
        "", 2022, "2210.12864"),
    "du2022efficient": _Paper(
        "Efficient Sharpness-aware Minimization for Improved Training of Neural Networks",
        "Du, Jiawei and Yan, Hanshu and Feng, Jiashi and Zhou, Joey Tianyi and Zhen, Liangli and Goh, Rick Siow Mong and Tan, Vincent Y. F.",
        "ICLR", 2022, "2110.03141"),
    "deng2025ausam": _Paper(
        "Asymptotic Unbiased Sample Sampling to Speed Up Sharpness-Aware Minimization",
        "Deng, Jiaxin and Pang, Junbiao and Zhang, Baochang and Guo, Guodong",
        "AAAI", 2025, "2406.08001"),
    "cheng2026slsam": _Paper(
        "Sparse Layer Sharpness-Aware Minimization for Efficient Fine-Tuning",
        "Cheng, Yifei and Yang, Xianglin and Wang, Guoxia and Huang, Chao and Ma, Fei and Yu, Dianhai and Cao, Xiaochun and Shen, Li",
        "", 2026, "2602.09395"),
    "zhuang2022surrogate": _Paper(
        "Surrogate Gap Minimization Improves Sharpness-Aware Training",
        "Zhuang, Juntang and Gong, Boqing and Yuan, Liangzhe and Cui, Yin and Adam, Hartwig and Dvornek, Nicha and Tatikonda, Sekhar and Duncan, James and Liu, Ting",
        "ICLR", 2022, "2203.08065"),
    "yue2023wsam": _Paper(
        "Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term",
        "Yue, Yun and Jiang, Jiadi and Ye, Zhiling and Gao, Ning and Liu, Yongchao and Zhang, Ke",
        "KDD", 2023, "2305.15817"),
    "tan2025stable": _Paper(
        "Stabilizing Sharpness-aware Minimization Through A Simple Renormalization Strategy",
        "Tan, Chengli and Zhang, Jiangshe and Liu, Junmin and Wang, Yicheng and Hao, Yunda",
        "JMLR", 2025, "2401.07250"),
    "andriushchenko2022towards": _Paper(
        "Towards Understanding Sharpness-Aware Minimization",
        "Andriushchenko, Maksym and Flammarion, Nicolas",
        "ICML", 2022, "2206.06232"),
    "li2024friendly": _Paper(
        "Friendly Sharpness-Aware Minimization",
        "Li, Tao and Zhou, Pan and He, Zhengbao and Cheng, Xinwen and Huang, Xiaolin",
        "CVPR", 2024, "2403.12350"),
    "kim2022fisher": _Paper(
        "Fisher SAM: Information Geometry and Sharpness Aware Minimisation",
        "Kim, Minyoung and Li, Da and Hu, Shell Xu and Hospedales, Timothy",
        "ICML", 2022, "2206.04920"),
    "jacobsen2025monge": _Paper(
        "Monge SAM: Robust Reparameterization-Invariant Sharpness-Aware Minimization Based on Loss Geometry",
        "Jacobsen, Albert Kjøller and Arvanitidis, Georgios",
        "", 2025, "2502.08448"),
    "haas2024mup2": _Paper(
        "µP²: Effective Sharpness Aware Minimization Requires Layerwise Perturbation Scaling",
        "Haas, Moritz and Xu, Jin and Cevher, Volkan and Vankadara, Leena Chennuru",
        "NeurIPS", 2024, "2411.00075"),
    "behdin2022msam": _Paper(
        "Improved Deep Neural Network Generalization Using m-Sharpness-Aware Minimization",
        "Behdin, Kayhan and Song, Qingquan and Gupta, Aman and Durfee, David and Acharya, Ayan and Keerthi, Sathiya and Mazumder, Rahul",
        "", 2022, "2212.04343"),
    "cheng2025lightsam": _Paper(
        "LightSAM: Parameter-Agnostic Sharpness-Aware Minimization",
        "Cheng, Yifei and Shen, Li and Sun, Hao and Yin, Nan and Cao, Xiaochun and Chen, Enhong",
        "", 2025, "2505.24399"),
    "sun2024adasam": _Paper(
        "AdaSAM: Boosting Sharpness-Aware Minimization with Adaptive Learning Rate and Momentum for Training Deep Neural Networks",
        "Sun, Hao and Shen, Li and Zhong, Qihuang and Ding, Liang and Chen, Shixiang and Sun, Jingwei and Li, Jing and Sun, Guangzhong and Tao, Dacheng",
        "Neural Networks", 2024, "2303.00565"),
    "xie2024bisam": _Paper(
        "Improving SAM Requires Rethinking its Optimization Formulation",
        "Xie, Wanyun and Latorre, Fabian and Antonakopoulos, Kimon and Pethick, Thomas and Cevher, Volkan",
        "ICML", 2024, "2407.12993"),
    "li2025focalsam": _Paper(
        "Focal-SAM: Focal Sharpness-Aware Minimization for Long-Tailed Classification",
        "Li, Sicong and Xu, Qianqian and Yang, Zhiyong and Wang, Zitai and Zhang, Linchao and Cao, Xiaochun and Huang, Qingming",
        "ICML", 2025, "2505.01660"),
    "zhou2023imbsam": _Paper(
        "ImbSAM: A Closer Look at Sharpness-Aware Minimization in Class-Imbalanced Recognition",
        "Zhou, Yixuan and Qu, Yi and Xu, Xing and Shen, Hengtao",
        "ICCV", 2023, "2308.07815"),
    "mi2022ssam": _Paper(
        "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach",
        "Mi, Peng and Shen, Li and Ren, Tianhe and Zhou, Yiyi and Sun, Xiaoshuai and Ji, Rongrong and Tao, Dacheng",
        "NeurIPS", 2022, "2210.05177"),
    "mueller2023samon": _Paper(
        "Normalization Layers Are All That Sharpness-Aware Minimization Needs",
        "Müller, Maximilian and Vlaar, Tiffany and Rolnick, David and Hein, Matthias",
        "NeurIPS", 2023, "2306.04226"),
    "wang2024lets": _Paper(
        "Enhancing Sharpness-Aware Minimization by Learning Perturbation Radius",
        "Wang, Xuehao and Jiang, Weisen and Fu, Shuai and Zhang, Yu",
        "ECML-PKDD", 2024, "2408.08222"),
    "teng2025lsam": _Paper(
        "LSAM: Asynchronous Distributed Training with Landscape-Smoothed Sharpness-Aware Minimization",
        "Teng, Yunfei and Zhang, Sixin",
        "", 2025, "2509.03110"),
    "becker2025momentum": _Paper(
        "Momentum-SAM: Sharpness Aware Minimization without Computational Overhead",
        "Becker, Marlon and Altrock, Frederick and Risse, Benjamin",
        "NeurIPS", 2025, "2401.12033"),
    "jo2025async": _Paper(
        "Asynchronous Sharpness-Aware Minimization For Fast and Accurate Deep Learning",
        "Jo, Junhyuk and Lim, Jihyun and Lee, Sunwoo",
        "", 2025, "2503.11147"),
    "wu2024crsam": _Paper(
        "CR-SAM: Curvature Regularized Sharpness-Aware Minimization",
        "Wu, Tao and Luo, Tie and Wunsch, Donald C.",
        "AAAI", 2024, "2312.13555"),
    "chen2026xsam": _Paper(
        "Revisiting Sharpness-Aware Minimization: A More Faithful and Effective Implementation",
        "Chen, Jianlong and Zhou, Zhiming",
        "ICLR", 2026, "2603.10048"),
    "duan2026xsam": _Paper(
        "X-SAM: Boosting Sharpness-Aware Minimization with Dominant-Eigenvector Gradient Correction",
        "Duan, Hongru and Chen, Yongle and Guan, Lei",
        "", 2026, "2601.10251"),
    "mordido2024lookbehind": _Paper(
        "Lookbehind-SAM: k steps back, 1 step forward",
        "Mordido, Gonçalo and Malviya, Pranshu and Baratin, Aristide and Chandar, Sarath",
        "ICML", 2024, "2307.16704"),
    "li2025tilted": _Paper(
        "Reweighting Local Minima with Tilted SAM",
        "Li, Tian and Zhou, Tianyi and Bilmes, Jeffrey A.",
        "ICML", 2025, "2410.22656"),
    "oikonomou2026polyak": _Paper(
        "Adaptive Sharpness-Aware Minimization with a Polyak-type Step size: A Theory-Grounded Scheduler",
        "Oikonomou, Dimitris and Loizou, Nicolas",
        "ICML", 2026, "2606.01827"),
    "shin2025sassha": _Paper(
        "Sassha: Sharpness-aware Adaptive Second-order Optimization with Stable Hessian Approximation",
        "Shin, Dahun and Lee, Dongyeop and Chung, Jinseok and Lee, Namhoon",
        "ICML", 2025, "2502.18153"),
    "zhang2023gam": _Paper(
        "Gradient Norm Aware Minimization Seeks First-Order Flatness and Improves Generalization",
        "Zhang, Xingxuan and Xu, Renzhe and Yu, Han and Zou, Hao and Cui, Peng",
        "CVPR", 2023, "2303.03108"),
    "moellenhoff2023bsam": _Paper(
        "SAM as an Optimal Relaxation of Bayes",
        "Möllenhoff, Thomas and Khan, Mohammad Emtiyaz",
        "ICLR", 2023, "2210.01620"),
    "zhao2022penalizing": _Paper(
        "Penalizing Gradient Norm for Efficiently Improving Generalization in Deep Learning",
        "Zhao, Yang and Zhang, Hao and Hu, Xiuyuan",
        "ICML", 2022, "2202.03599"),
    "du2022saf": _Paper(
        "Sharpness-Aware Training for Free",
        "Du, Jiawei and Zhou, Daquan and Feng, Jiashi and Tan, Vincent Y. F. and Zhou, Joey Tianyi",
        "NeurIPS", 2022, "2205.14083"),
    "singh2025functional": _Paper(
        "Avoiding Spurious Sharpness Minimization Broadens Applicability of SAM",
        "Singh, Sidak Pal and Mobahi, Hossein and Agarwala, Atish and Dauphin, Yann",
        "ICML", 2025, "2502.02407"),
    "luo2026logits": _Paper(
        "Sharpness-Aware Minimization in Logit Space Efficiently Enhances Direct Preference "
        "Optimization",
        "Luo, Haocheng and Deng, Zehang and Do, Thanh-Toan and Harandi, Mehrtash and Phung, Dinh "
        "and Le, Trung",
        "ICLR", 2026, "2603.18258"),
    "li2025flatlora": _Paper(
        "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape",
        "Li, Tao and He, Zhengbao and Li, Yujun and Wang, Yasheng and Shang, Lifeng and "
        "Huang, Xiaolin",
        "ICML", 2025, "2409.14396"),
    "liu2026bilora": _Paper(
        "Bi-LoRA: Efficient Sharpness-Aware Minimization for Fine-Tuning Large-Scale Models",
        "Liu, Yuhang and Li, Tao and Huang, Zhehao and Yang, Zuopeng and Huang, Xiaolin",
        "ICLR", 2026, "2508.19564"),
    "hassan2025gcsam": _Paper(
        "GCSAM: Gradient Centralized Sharpness Aware Minimization",
        "Hassan, Mohamed and Vakanski, Aleksandar and Zhang, Boyu and Xian, Min",
        "", 2025, "2501.11584"),
    "yun2025zsharp": _Paper(
        "Sharpness-Aware Minimization with Z-Score Gradient Filtering",
        "Yun, Vincent-Daniel",
        "", 2025, "2505.02369"),
    "wang2026lesam": _Paper(
        "Fix the Loss, Not the Radius: Rethinking the Adversarial Perturbation of Sharpness-Aware Minimization",
        "Wang, Jinping and Liu, Qinhan and Xie, Zhiwu and Gao, Zhiqiang",
        "ICML", 2026, "2605.10183"),
    "oikonomou2025unified": _Paper(
        "Sharpness-Aware Minimization: General Analysis and Improved Rates",
        "Oikonomou, Dimitris and Loizou, Nicolas",
        "ICLR", 2025, "2503.02225"),
    "wang2023sagm": _Paper(
        "Sharpness-Aware Gradient Matching for Domain Generalization",
        "Wang, Pengfei and Zhang, Zhaoxiang and Lei, Zhen and Zhang, Lei",
        "CVPR", 2023, "2303.10353"),
    "pethick2025training": _Paper(
        "Training Deep Learning Models with Norm-Constrained LMOs",
        "Pethick, Thomas and Xie, Wanyun and Antonakopoulos, Kimon and Zhu, Zhenyu and Silveti-Falls, Antonio and Cevher, Volkan",
        "ICML", 2025, "2502.07529"),
    "luo2024eigensam": _Paper(
        "Explicit Eigenvalue Regularization Improves Sharpness-Aware Minimization",
        "Luo, Haocheng and Truong, Tuan and Pham, Tung and Harandi, Mehrtash and Phung, Dinh and Le, Trung",
        "NeurIPS", 2024, "2501.12666"),
    "bisla2022lpfsgd": _Paper(
        "Low-Pass Filtering SGD for Recovering Flat Optima in the Deep Learning Optimization Landscape",
        "Bisla, Devansh and Wang, Jing and Choromanska, Anna",
        "AISTATS", 2022, "2201.08025"),
    "li2022rwp": _Paper(
        "Efficient Generalization Improvement Guided by Random Weight Perturbation",
        "Li, Tao and Yan, Weihao and Lei, Zehao and Wu, Yingwen and Fang, Kun and Yang, Ming and Huang, Xiaolin",
        "", 2022, "2211.11489"),
    "li2024marwp": _Paper(
        "Revisiting Random Weight Perturbation for Efficiently Improving Generalization",
        "Li, Tao and Tao, Qinghua and Yan, Weihao and Wu, Yingwen and Lei, Zehao and Fang, Kun and He, Mingzhen and Huang, Xiaolin",
        "TMLR", 2024, "2404.00357"),
}
# fmt: on


def _entry(
    name: str,
    factory: Callable[..., Any],
    call: str,
    method: str,
    key: str,
    shape: Literal["chain", "wraps", "optimizer"],
    closures: tuple[str, ...],
    gradients: str,
    state: str,
    fidelity: str,
    evidence: Literal["authors", "others", "reconstructed"],
) -> Entry:
    paper = PAPERS[key]
    return Entry(
        name,
        factory,
        call,
        method,
        *paper,
        key,
        shape,
        closures,
        gradients,
        state,
        fidelity,
        evidence,
    )


# fmt: off
ENTRIES = (
    _entry("sam", sam, "sam(rho=0.05)",
           "SAM", "foret2021sharpness", "chain", LOSS,
           "2, sequential", "0",
           "matches davda54/sam, the most used port (SGD, momentum, AdamW), to 1e-12",
           "others"),
    _entry("sharpness_aware", sharpness_aware, "sharpness_aware(perturbation, ascent_steps=1)",
           "SAM in any geometry", "foret2021sharpness", "chain", LOSS,
           "1 + ascent steps, sequential", "0",
           "several steps equal `optax.contrib.sam(sync_period)` to 1e-11",
           "others"),
    _entry("asam", asam, "asam(rho=0.5, eta=0.01)",
           "ASAM", "kwon2021asam", "chain", LOSS,
           "2, sequential", "0",
           "matches SamsungLabs/ASAM to 1e-12; of the paper's filter-wise form no code was found, "
           "see the docstring",
           "authors"),
    _entry("sampa", sampa, "sampa(base, rho=0.1, lam=0.2, batch_like=...)",
           "SAMPa", "xie2024sampa", "wraps", LOSSES,
           "2, in parallel", "1 P, and a batch",
           "matches LIONS-EPFL/SAMPa (SGD, momentum, decay, cosine) to 1e-12; with Adam there is"
           " no published code, and the trial step through the base is our reading",
           "authors"),
    _entry("looksam", looksam, "looksam(rho=0.05, period=5, alpha=0.1)",
           "LookSAM", "liu2022looksam", "chain", LOSS,
           "1 + 1/period", "1 P",
           "no code by the authors; matches the global implementation of MarlonBecker/MSAM to "
           "1e-10 (other epsilons). The tensor-by-tensor form of common ports is another "
           "algorithm",
           "others"),
    _entry("look_layer_sam", look_layer_sam, "look_layer_sam(rho=0.05, period=5, alpha=0.1, scaling=...)",
           "Look-LayerSAM", "liu2022looksam", "chain", LOSS,
           "1 + 1/period", "1 P",
           "**reconstructed**: the scaling rule is recalled, not read, so it is an argument",
           "reconstructed"),
    _entry("periodic", perturb_if, "perturb_if(policies.every(5), sam(0.05))",
           "periodic SAM (SAM-k)", "liu2022looksam", "chain", LOSS,
           "1 + 1/period", "0",
           "the definition",
           "others"),
    _entry("rst", perturb_if, "perturb_if(policies.random(0.5), sam(0.05))",
           "RST (SS-SAM)", "zhao2023randomized", "chain", LOSS,
           "1 + probability", "0",
           "from the abstract, which defines it",
           "others"),
    _entry("g_rst", perturb_if, "perturb_if(policies.random(0.5), combinations.mix(sam(0.05), 2.0))",
           "G-RST", "zhao2023randomized", "chain", LOSS,
           "1 + probability", "0",
           "**reconstructed** from the abstract: the mixing line is inferred",
           "reconstructed"),
    _entry("ae_sam", ae_sam, "ae_sam(rho=0.05, threshold=0.0)",
           "AE-SAM", "jiang2023adaptive", "chain", LOSS,
           "1 + the share of long gradients, about one half", "0",
           "no code; two secondary transcriptions agree, and it matches an independent "
           "implementation of them to 1e-12; constants recalled",
           "others"),
    _entry("ae_looksam", ae_looksam, "ae_looksam(rho=0.05, threshold=0.0, alpha=0.1)",
           "AE-LookSAM", "jiang2023adaptive", "chain", LOSS,
           "as `ae_sam`", "1 P",
           "**reconstructed** from memory; matches an independent implementation to 1e-10",
           "reconstructed"),
    _entry("vsam", vsam, "vsam(rho=0.05)",
           "vSAM", "deng2024vsam", "chain", LOSS,
           "1 + quota/window", "1 P",
           "matches ajiaaa/vSAM to 1e-12, controller and replayed draws included",
           "authors"),
    _entry("arsam", arsam, "arsam(rho=0.05, policy=..., mixing=...)",
           "ARSAM", "deng2025arsam", "chain", LOSS,
           "as its policy", "1 P",
           "**reconstructed** from the abstract; with vSAM's policy and mixing it is `vsam`, "
           "exactly",
           "reconstructed"),
    _entry("ksam", ksam, "ksam(rho=0.05, num_selected=64)",
           "K-SAM", "ni2022ksam", "chain", LOSSES,
           "1 forward + 2 k/B", "0",
           "**reconstructed** from the abstract: no code; that both gradients use the same "
           "examples is inferred. Matches an independent implementation to 1e-12",
           "reconstructed"),
    _entry("esam", esam, "esam(rho=0.05, perturbed_fraction=0.6, selected_fraction=0.5)",
           "ESAM", "du2022efficient", "chain", LOSSES,
           "1 + 1 forward + γ", "0",
           'matches dydjw9/Efficient_SAM to 1e-14 with `select="strict"`, its draws replayed; '
           "the default selects one example more",
           "authors"),
    _entry("ausam", ausam, "ausam(rho=0.1, fraction=0.5, num_examples=...)",
           "AUSAM", "deng2025ausam", "chain", (*LOSSES, "index"),
           "2 α; 2 in the first epoch", "0, and 2 numbers per example of the data set",
           "matches ajiaaa/AUSAM to 1e-11, score table and probabilities included, its draws "
           "replayed",
           "authors"),
    _entry("sl_sam", sl_sam, "sl_sam(base, rho=0.05, groups=4)",
           "SL-SAM", "cheng2026slsam", "wraps", LOSS,
           "2 of some layers", "0",
           "**reconstructed** from the abstract and a secondary source: the bandit's rates and "
           "reward are ours",
           "reconstructed"),
    _entry("gsam", gsam, "gsam(rho=0.05, alpha=0.4)",
           "GSAM", "zhuang2022surrogate", "chain", LOSS,
           "2, sequential", "0",
           "matches google-research/big_vision to 1e-12, its rho schedule included; with "
           '`ascent="local"` the combination uses means over the devices, there each device '
           "combines its own gradients",
           "authors"),
    _entry("wsam", wsam, "wsam(base, learning_rate, rho=0.05, gamma=0.9)",
           "WSAM", "yue2023wsam", "wraps", LOSS,
           "2, sequential", "0",
           "matches the authors' class in dlrover to 1e-12; its `max_norm` is not offered",
           "authors"),
    _entry("coupled_wsam", coupled_wsam, "coupled_wsam(rho=0.05, gamma=0.9)",
           "WSAM through the base", "yue2023wsam", "chain", LOSS,
           "2, sequential", "0",
           "matches the authors' class with `decouple=False` to 1e-12",
           "authors"),
    _entry("stable_sam", stable_sam, "stable_sam(rho=0.05)",
           "Stable SAM", "tan2025stable", "chain", LOSS,
           "2, sequential", "0",
           "matches cltan023/stablesam2024 (both of its files) to 1e-11; its adaptive form, "
           "which compares other norms, is not offered",
           "authors"),
    _entry("usam", usam, "usam(rho=0.05)",
           "USAM, un-normalized SAM", "andriushchenko2022towards", "chain", LOSS,
           "2, sequential", "0",
           "matches cltan023/stablesam2024, the code of Stable SAM's authors, without its "
           "renormalization to 1e-14",
           "others"),
    _entry("friendly_sam", friendly_sam, "friendly_sam(rho=0.05, sigma=1.0, decay=0.9)",
           "Friendly SAM", "li2024friendly", "chain", LOSS,
           "2, sequential", "1 P",
           "matches nblt/F-SAM to 1e-12; the paper's order of two lines differs, see the "
           "docstring",
           "authors"),
    _entry("fisher_sam", fisher_sam, "fisher_sam(rho=0.1, eta=1.0)",
           "Fisher SAM", "kim2022fisher", "chain", LOSS,
           "2, sequential", "0",
           "no code by the authors; matches a third party's (johnjaejunlee95/torch-unified-SAM-optimization) to 1e-12; the paper's text was not read",
           "others"),
    _entry("monge_sam", monge_sam, "monge_sam(rho=0.05)",
           "Monge SAM", "jacobsen2025monge", "chain", LOSS,
           "2, sequential", "0",
           "the paper's closed form; the authors' code could not be had, matches a third party's"
           " (manavdahra/sam-opt-research) to 1e-12",
           "others"),
    _entry("mup_sam", mup_sam, "mup_sam(rho, scales)",
           "µP²", "haas2024mup2", "chain", LOSS,
           "2, sequential", "0",
           "matches the first author's later code (moritzhaas/large-lr-width-scaling) to 1e-12; "
           '`normalization="layerwise"` matches an independent loop of the paper\'s definition; '
           "the rule for Flax's layers is derived from its tables",
           "authors"),
    _entry("msam", msam, "msam(rho=0.05, num_microbatches=4)",
           "mSAM", "behdin2022msam", "chain", LOSSES,
           "2, a piece at a time", "0",
           "extended as [mSAM](https://arxiv.org/abs/2302.09693), 2023; no code by the authors; matches "
           "davda54/sam driven microbatch by microbatch to 1e-12",
           "others"),
    _entry("lightsam_norm", lightsam_norm, "lightsam_norm(learning_rate, rho=0.05)",
           "LightSAM-I", "cheng2025lightsam", "optimizer", LOSS,
           "2, sequential", "0",
           "no code by the authors, text not read; matches a third party's (dimitris-"
           "oik/sam_sps) to 1e-14, with which a second transcription agrees",
           "others"),
    _entry("lightsam_adagrad", lightsam_adagrad, "lightsam_adagrad(learning_rate, rho=0.001)",
           "LightSAM-II", "cheng2025lightsam", "optimizer", LOSS,
           "2, sequential", "2 P",
           "no code by the authors, text not read; matches a third party's (dimitris-oik/sam_sps) to "
           "1e-14",
           "others"),
    _entry("lightsam_adam", lightsam_adam, "lightsam_adam(learning_rate, rho=0.001)",
           "LightSAM-III", "cheng2025lightsam", "optimizer", LOSS,
           "2, sequential", "4 P",
           "no code by the authors, text not read; matches a third party's (dimitris-oik/sam_sps) to "
           "1e-14; that a moving average is climbed is in one transcription only",
           "others"),
    _entry("adasam", adasam, "adasam(learning_rate, rho=0.05)",
           "AdaSAM", "sun2024adasam", "optimizer", LOSS,
           "2, sequential", "3 P",
           "no code by the authors, text not read; matches a third party's (dimitris-"
           "oik/sam_sps) to 1e-13 (no epsilon in its norm)",
           "others"),
    _entry("bisam", bisam, "bisam(rho=0.05)",
           "BiSAM", "xie2024bisam", "chain", ("value_fn", "ascent_fn"),
           "2, sequential", "0",
           "matches LIONS-EPFL/BiSAM, log and tanh, to 1e-12; its label smoothing is up to "
           "your loss. The paper's μ for tanh is not known",
           "authors"),
    _entry("focal_sam", focal_sam, "focal_sam(class_counts, rho=0.1, gamma=2.0, sharpness=0.8)",
           "Focal-SAM", "li2025focalsam", "chain", (*LOSSES, "labels"),
           "2 forward, 3 backward", "0",
           "matches scongl/Focal-SAM to 1e-12",
           "authors"),
    _entry("imbalanced_sam", imbalanced_sam, "imbalanced_sam(tail_classes, rho=0.05, tail_weight=1.0)",
           "ImbSAM", "zhou2023imbsam", "chain", (*LOSSES, "labels"),
           "2 forward, 3 backward", "0",
           "matches cool-xuan/Imbalanced_SAM to 1e-12 with `tail_weight=2`, a factor that its "
           "text does not have",
           "authors"),
    _entry("fisher_sparse_sam", fisher_sparse_sam, "fisher_sparse_sam(rho=0.05, sparsity=0.5, period=...)",
           "Sparse SAM (SSAM-F)", "mi2022ssam", "chain", LOSSES,
           "2, and one per example every `period` steps", "0, and a byte per parameter",
           "matches Mi-Peng/Sparse-Sharpness-Aware-Minimization, driven with the Fisher "
           "information of the paper, to 1e-14, masks exactly, unstructured and "
           "[n:m](https://arxiv.org/abs/2306.17504) (TPAMI 2025); the code as published adds "
           "stale gradients to it",
           "authors"),
    _entry("dynamic_sparse_sam", dynamic_sparse_sam, "dynamic_sparse_sam(rho=0.05, sparsity=0.5, drop_rate=0.5, period=...)",
           "Sparse SAM (SSAM-D)", "mi2022ssam", "chain", LOSS,
           "2, sequential", "0, and a byte per parameter",
           "matches Mi-Peng/Sparse-Sharpness-Aware-Minimization to 1e-14, masks exactly; its random "
           "draws differ",
           "authors"),
    _entry("sam_on", sam_on, "sam_on(rho=0.5)",
           "SAM-ON", "mueller2023samon", "chain", LOSS,
           "2, sequential", "0",
           "matches mueller-mp/SAM-ON to 2e-12; any metric as `perturbation=`",
           "authors"),
    _entry("lets", lets, "lets(base, rho=0.05, rho_learning_rate=1.0)",
           "LETS", "wang2024lets", "wraps", ("value_fn", "training_fn", "validation_fn"),
           "6, or 4 without Hessian products", "0",
           "**partly reconstructed**: the objective is the paper's, its derivative the chain "
           "rule's; the update of log ρ and the form of the diagonal are inferred: no code, and "
           "only the head of the text was read",
           "reconstructed"),
    _entry("lsam", lsam, "lsam(base, rho=0.05, beta=0.9, period=4, worker_axis=...)",
           "LSAM, synchronous", "teng2025lsam", "wraps", LOSS,
           "2, sequential, on each worker", "1 P",
           "asynchronous: `elastic.train`. **Reconstructed**: the objective is known second-"
           "hand; that elastic averaging moves its samples is our derivation; no code. Matches "
           "the authors' [EASGD](https://arxiv.org/abs/1412.6651) file (sixin-zh/mpiT), given "
           "SAM's gradient, to 1e-12; with `rho=0` it is that EASGD",
           "reconstructed"),
    _entry("momentum_sam", momentum_sam, "momentum_sam(base, rho=3.0)",
           "Momentum-SAM", "becker2025momentum", "wraps", LOSS,
           "1", "0",
           "matches MarlonBecker/MSAM (SGD with momentum, AdamW) to 1e-11; weight decay stands "
           "where optax has it, see its docstring",
           "authors"),
    _entry("async_sam", async_sam, "async_sam(rho=0.05)",
           "AsyncSAM", "jo2025async", "chain", LOSS,
           "1 + b′/b, which do not wait for each other", "1 P",
           "**partly reconstructed**: no code, text not read; that a gradient one step old is "
           "climbed and that a slower device computes it on a smaller batch are the paper's (two"
           " secondary summaries agree); that it is normalized is in one transcription; the "
           "first step and the examples in b′ are inferred. "
           "Matches an independent loop to 1e-10; on two devices and in one program the same",
           "reconstructed"),
    _entry("gcsam", gcsam, "gcsam(rho=0.05)",
           "GCSAM", "hassan2025gcsam", "chain", LOSS,
           "2, sequential", "0",
           "matches Mohamed-Hassan22/GCSAM to 1e-12; the paper, as a third party transcribes it, has "
           "another norm and centralizes both gradients",
           "authors"),
    _entry("zsharp", zsharp, "zsharp(rho=0.05, quantile=0.95)",
           "ZSharp", "yun2025zsharp", "chain", LOSS,
           "2, sequential", "0",
           "matches YUNBLAK/Sharpness-Aware-Minimization-with-Z-Score-Gradient-Filtering to 1e-12",
           "authors"),
    _entry("le_sam", le_sam, "le_sam(sigma=0.35, rho_max=0.3)",
           "LE-SAM", "wang2026lesam", "chain", LOSS,
           "2, sequential", "0",
           "matches smithgun2005/LE-SAM-ICML2026 to 1e-12; its mean of the largest losses of the batch "
           "is up to your loss",
           "authors"),
    _entry("unified_sam", unified_sam, "unified_sam(rho=0.1)",
           "Unified SAM", "oikonomou2025unified", "chain", LOSS,
           "2, sequential", "0",
           "matches dimitris-oik/unifiedsam to 1e-12",
           "authors"),
    _entry("sagm", sagm, "sagm(rho=0.05, alpha=0.001)",
           "SAGM", "wang2023sagm", "chain", LOSS,
           "2, sequential", "0",
           "matches Wang-pengfei/SAGM to 1e-12; the paper, as we remember it, adds both gradients "
           "without the half",
           "authors"),
    _entry("gnp", gnp, "gnp(rho=0.1, alpha=0.8)",
           "GNP, gradient-norm penalty", "zhao2022penalizing", "chain", LOSS,
           "2, sequential", "0",
           "matches zhaoyang-0204/gnp to 1e-12, in the paper's form and in the form of its published "
           "runs, `clean=\"unit\"`; warm-ups too",
           "authors"),
    _entry("eigen_sam", eigen_sam, "eigen_sam(rho=0.05, alpha=0.2, every=100)",
           "Eigen-SAM", "luo2024eigensam", "chain", LOSS,
           "2, and 5 Hessian products every 100 steps", "1 P",
           "matches RitianLuo/EigenSAM to 1e-10, eigenvectors included, its first vector given; its "
           "un-normalized steps before the first refresh are `before_refresh=\"usam\"`",
           "authors"),
    _entry("spectral_sam", spectral_sam, "spectral_sam(rho=0.05)",
           "SAM in the spectral norm", "pethick2025training", "chain", LOSS,
           "2, sequential", "0",
           "a definition of samx in the paper's geometry; matches an independent loop to 1e-12",
           "others"),
    _entry("lpf_sgd", lpf_sgd, "lpf_sgd(sigma=0.001)",
           "LPF-SGD", "bisla2022lpfsgd", "chain", LOSSES,
           "1", "0",
           "matches devansh20la/LPF-SGD to 1e-12, its draws replayed",
           "authors"),
    _entry("rwp", rwp, "rwp(sigma=0.01, alpha=0.5)",
           "RWP", "li2022rwp", "chain", LOSSES,
           "1, in two halves", "0",
           "matches nblt/RWP, run on two processes, to 1e-12, its draws replayed",
           "authors"),
    _entry("arwp", arwp, "arwp(sigma=0.01, eta=1.0)",
           "ARWP", "li2024marwp", "chain", LOSS,
           "1", "1 P",
           "matches nblt/mARWP to 1e-12, its draws replayed",
           "authors"),
    _entry("marwp", marwp, "marwp(sigma=0.01, eta=1.0)",
           "m-ARWP", "li2024marwp", "chain", LOSSES,
           "1, in two halves", "1 P",
           "matches nblt/mARWP to 1e-12, its draws replayed",
           "authors"),
    _entry("saf", saf, "saf(lam=0.3, temperature=5.0, num_examples=..., logits_like=...)",
           "SAF", "du2022saf", "chain", (*LOGITS, "index"),
           "1", "0, and `lag + 1` logits of every example of the data set",
           "matches AngusDujw/SAF to 1e-14, cross-entropy without smoothing",
           "authors"),
    _entry("mesa", mesa, "mesa(lam=0.8, temperature=5.0, decay=0.9998, steps_per_epoch=...)",
           "MESA", "du2022saf", "chain", LOGITS,
           "1, and one more forward pass", "1 P",
           "matches AngusDujw/SAF (MESA) to 1e-14, cross-entropy without smoothing",
           "authors"),
    _entry("functional_sam", functional_sam, "functional_sam(rho=0.05)",
           "Functional-SAM", "singh2025functional", "chain", LOGITS,
           "2, sequential", "0",
           "**reconstructed** from the equation; matches an own run by it to 1e-10, and an independent "
           "loop",
           "reconstructed"),
    _entry("logits_sam", logits_sam, "logits_sam(rho=0.05)",
           "logits-SAM", "luo2026logits", "chain",
           ("features_fn", "head_fn", "loss_on_logits", "batch"),
           "1, and two thirds of the output layer's share", "0",
           "matches RitianLuo/logits-sam-dpo to 1e-14, norms in float64",
           "authors"),
    _entry("flat_lora", flat_lora, "flat_lora(rho=0.05, num_steps=...)",
           "Flat-LoRA", "li2025flatlora", "chain", LOSS,
           "1", "0",
           "**reconstructed** from nblt/Flat-LoRA, which was read and not run; matches an independent "
           "loop to 1e-10",
           "reconstructed"),
    _entry("bi_lora", bi_lora, "bi_lora(rho=0.05, rank=8)",
           "Bi-LoRA", "liu2026bilora", "chain", LOSS,
           "1", "the pairs of low rank, and their optimizer's state",
           "**reconstructed** from a note on the paper; matches an independent loop to 1e-10",
           "reconstructed"),
    _entry("bsam", bsam, "bsam(learning_rate, num_examples)",
           "bSAM", "moellenhoff2023bsam", "optimizer", LOSSES,
           "2, sequential", "2 P",
           "matches team-approx-bayes/bayesian-sam to 1e-10, momentum and precision included, its draws "
           "replayed; a corrected third-party translation agrees",
           "authors"),
    _entry("cr_sam", cr_sam, "cr_sam(rho=0.1, gamma=0.1, beta=0.01)",
           "CR-SAM", "wu2024crsam", "chain", LOSS,
           "3, two of them independent", "0",
           "matches TrustAIoT/CR-SAM to 1e-12, whose differences are divided by nothing",
           "authors"),
    _entry("xsam", xsam, "xsam(rho=0.15, every=100)",
           "XSAM (slerp)", "chen2026xsam", "chain", LOSS,
           "2, and 21 forward passes every 100 steps", "0",
           "matches Cccjl219/XSAM to 1e-11, its search included",
           "authors"),
    _entry("x_sam", x_sam, "x_sam(rho=0.05, alpha=0.2, every=5)",
           "X-SAM (eigenvector)", "duan2026xsam", "chain", LOSS,
           "2, and 5 Hessian products every 5 steps", "1 P",
           "**reconstructed** from huang5467/X-SAM, which was read and not run; matches an independent "
           "loop to 1e-10",
           "reconstructed"),
    _entry("lookbehind_sam", lookbehind_sam, "lookbehind_sam(base, rho=0.05, steps=5, alpha=0.5)",
           "Lookbehind-SAM, -ASAM", "mordido2024lookbehind", "wraps", LOSS,
           "k + 1, sequential", "0",
           "matches chandar-lab/Lookbehind-SAM to 1e-12, with SAM's ball and with ASAM's; its loop "
           "takes 2 k gradients",
           "authors"),
    _entry("tsam", tsam, "tsam(rho=0.05, tilt=1.0, samples=3)",
           "TSAM", "li2025tilted", "chain", LOSS,
           "2 S, in S independent pairs", "0",
           "matches litian96/TSAM to 1e-12, its draws replayed",
           "authors"),
    _entry("sam_polyak", sam_polyak, "sam_polyak(rho=0.1, max_learning_rate=1.0)",
           "SAM-Polyak", "oikonomou2026polyak", "optimizer", LOSS,
           "2, sequential", "0",
           "matches sam-sps 1.0.0 to 1e-12, its casts to float32 lifted",
           "authors"),
    _entry("sassha", sassha, "sassha(learning_rate, rho=0.05)",
           "SASSHA", "shin2025sassha", "optimizer", LOSS,
           "2, and 1 Hessian product every 10 steps", "2 P",
           "matches LOG-postech/Sassha to 1e-10, with its Hessian product taken at w + ε as in the "
           "paper, its draws replayed",
           "authors"),
    _entry("msassha", msassha, "msassha(learning_rate, rho=0.3)",
           "M-SASSHA", "shin2025sassha", "optimizer", LOSS,
           "1, and 1 Hessian product every 10 steps", "2 P",
           "**reconstructed**: the published code cannot run; matches an independent loop to 1e-10",
           "reconstructed"),
    _entry("gam", gam, "gam(rho=0.2, rho_prime=0.02)",
           "GAM, accelerated", "zhang2023gam", "chain", LOSS,
           "4, sequential", "0",
           "matches xxgege/GAM to 1e-11, adaptive too",
           "authors"),
    _entry("gam_exact", gam_exact, "gam_exact(rho=0.2, alpha=0.5)",
           "GAM, the equation", "zhang2023gam", "chain", LOSS,
           "2, and 2 Hessian products", "0",
           "**reconstructed**: the published code has the accelerated form alone; matches an "
           "independent run of the equation to 1e-10",
           "reconstructed"),
)
