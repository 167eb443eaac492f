"""Examples of every command, as its `--help` and docs/reference/cli.md show them."""

from __future__ import annotations

import re

# Command lines, those of a command one after the other. Tests parse all of them.
EXAMPLES = r"""
fedprune-export model.onnx --target raspberry-pi-zero-2w --out bundle
fedprune-export nets:unet --input-shape 3,64,64 --target raspberry-pi-5,jetson-orin-nano --out bundles
fedprune-export groups model.onnx
fedprune-export groups timm:resnet18 --json
fedprune-export operators
fedprune-export verify bundle
fedprune-export verify bundle --model model.onnx
fedprune-export to-onnx bundle board.onnx
fedprune-export to-onnx model.onnx global.onnx --weights global.safetensors
fedprune-export to-torch bundle board.pt
fedprune-export to-torch bundle whole.safetensors --into model.onnx
fedprune-export profiles list
fedprune-export profiles list --folder my-boards
fedprune-export profiles show raspberry-pi-5
fedprune-export profiles show my-boards/vision-box.toml --json
fedprune-export profiles check my-boards/vision-box.toml
fedprune-export profiles check my-boards/*.toml --json
fedprune-export profiles identify --model 'Raspberry Pi 5 Model B Rev 1.0' --memory 8000000000
fedprune-export profiles identify --compatible nvidia,p3767-0005 --l4t 36.4.3 --json
fedprune-server run --model model.onnx --evaluation test.npz --strategy fedprune --rounds 20
fedprune-server run --config fleet.toml --state state --host 0.0.0.0 --console 8470
fedprune-server status --state state --rounds 3
fedprune-server export-model --state state --out global.onnx
fedprune-server export-model --state state --round 12 --out round-12.safetensors
fedprune-server export-model --state state --out for-the-hub
fedprune-server init --state state
fedprune-server init --state state --site north --json
fedprune-server identity --state state
fedprune-server identity replace --state state
fedprune-server claim --state state --device attic --out attic.claim
fedprune-server claim --state state --count 40 --hours 24 --out claims
fedprune-server devices --state state
fedprune-server devices approve attic --key 4f2a --state state
fedprune-server broker-config mosquitto --state state --host broker.example --out mosquitto
fedprune-server broker-config emqx --state state --host broker.example --out emqx --at /etc/emqx
fedprune-server demo --out demo-run
fedprune-server demo --quick
fedprune-server release --wheels wheels --number 7 --state state --out release-7
fedprune-server release --again release-6 --number 8 --state state --out release-8
fedprune-server rollout start release-7 --state state
fedprune-server rollout start release-7 --groups 1,25%,100% --state state
fedprune-server rollout pause --state state
fedprune-server rollout pause --reason 'two boards are hot' --state state
fedprune-server rollout resume --state state
fedprune-server rollout list --state state
fedprune-server rollout status --state state
fedprune-server rollout stop --state state
fedprune-server rollout stop --reason 'the camera fails' --state state
fedprune-server rollout back --reason 'accuracy fell' --state state
fedprune-server rollout back --groups 10%,100% --state state
fedprune-server check --state state
fedprune-server check --state state --repair --from backups/state
fedprune-server backup --state state --to backups/state
fedprune-server restore --from backups/state --state restored
fedprune-server restore --from backups/state --state restored --dry-run
fedprune-server alerts test --state state
fedprune-server alerts test --alert-webhook https://chat.example/hooks/abc
fedprune-server config check fleet.toml
fedprune-server config show --config fleet.toml --all
fedprune-server config show --state state --rounds 50
fedprune-server health
fedprune-server health --ready
fedprune-server crashes --state state
fedprune-server crashes --device attic --state state --json
fedprune-server doctor --state state
fedprune-server pause --state state
fedprune-server pause --state state --job leaves
fedprune-server resume --state state
fedprune-server resume --state state --job leaves
fedprune-server operators add ann --role admin --state state
fedprune-server operators add bob --state state <password.txt
fedprune-server operators password ann --state state
fedprune-server operators password ann --state state <password.txt
fedprune-server operators remove ann
fedprune-server operators remove ann --state state
fedprune-server operators list --state state
fedprune-device join --broker mqtts://192.168.1.10 --device attic --claim attic.claim --state board
fedprune-device join --broker mqtts://192.168.1.10 --device attic --pin "$PIN" --state board
fedprune-device run --broker mqtts://192.168.1.10 --device attic --data samples.npz --state board
fedprune-device run --broker mqtts://192.168.1.10 --device attic --data local --local --state board
fedprune-device train --bundle bundle --data samples.npz --out trained
fedprune-device train --bundle bundle --data photos --epochs 5 --lr 0.01 --out trained
fedprune-device predict --state board --input new.npy
fedprune-device predict --bundle bundle --input test.npz --top 3
fedprune-device data check --data photos --bundle bundle
fedprune-device data check --data photos --bundle bundle --out photos.html
fedprune-device sensors --config examples/sensors/zigbee2mqtt.toml
fedprune-device sensors --patient --config /etc/fedprune/sensors.toml
fedprune-device probe
fedprune-device probe --json >probe.json
fedprune-device identify
fedprune-device build-engine --state board
fedprune-device build-engine --bundle bundle --out engine --json
fedprune-device update --release release-2 --attempts 5
fedprune-device update --release release-2 --stage-only
fedprune-device slots
fedprune-flash kit --server mqtts://broker --device a --claim-file claim --signing-key signing.key --out kit
fedprune-flash kit --server mqtts://192.168.1.10 --device any --signing-key signing.key --out pi-kit
fedprune-flash image raspios.img --kit kit --signing-key signing.key --user ann --ssh-key id.pub --out o.img
fedprune-flash image raspios.img.xz --kit kit --unsigned --out attic.img --dry-run
fedprune-simulate --config fleet.toml --out sim --reference
fedprune-simulate --demo --rounds 5 --out quick --json
fedprune-simulate compare sims/fedavg sims/fedprune --out sims/both
fedprune-simulate compare sims/fedavg sims/fedprune --out sims/both --target 0.8
fedprune-simulate sweep sweep.toml --out sims --workers 4
fedprune-simulate sweep sweep.toml --out sims --ray
fedprune-simulate new fleet
fedprune-simulate new fleet --boards attic=raspberry-pi-zero-2w:40KB,dock=jetson-orin-nano
fedprune-simulate advise --config fleet.toml --out advice --workers 4
fedprune-simulate advise --config fleet.toml --out advice-long --rounds 20 --seeds 3 --json
""".strip().splitlines()

_COMMAND = re.compile("[a-z-]+")


def examples_of(prog: str) -> list[str]:
    """Examples of a command, such as `fedprune-server rollout start`; of a program, those of none of its commands."""
    words = prog.split()
    lines = [line for line in EXAMPLES if line.split()[: len(words)] == words]
    if len(words) > 1:
        return lines
    return [line for line in lines if line.split()[1].startswith("-") or not _COMMAND.fullmatch(line.split()[1])]
