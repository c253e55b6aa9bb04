// How to submit a job and add a worker: capture needs the model's code, so it is done where the model is, by a command.

import { AgainForm } from "./again_form.js";
import { el, section } from "./dom.js";

const SPEC = `name: gpt-small
model: {entrypoint: models/gpt.py:build, args: {layers: 4, width: 128}}
loss:  {entrypoint: models/gpt.py:loss}
data:  {text: corpus.txt, tokenizer: bytes, sequence_length: 128}
train: {steps: 200, global_batch: 32, micro_batch: 4, optimizer: {name: adamw, lr: 3.0e-4}}`;

// A command with a button that copies it.
export function command(text, label) {
  const said = el("span", { class: "quiet", role: "status" });
  const copy = el("button", {
    type: "button", text: "Copy", "aria-label": `Copy the command: ${label}`,
    onclick: async () => {
      try {
        await navigator.clipboard.writeText(text);
        said.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(code);
        said.textContent = "selected: copy it by hand";
      }
    },
  });
  const code = el("code", { text });
  return el("div", { class: "command" }, el("pre", { tabindex: "0" }, code), copy, said);
}

export function submitPage(main) {
  const here = location.origin;
  const again = new AgainForm();
  main.append(
    section("Submit a job",
      el("p", { text: "On the machine that has the model and its data, in the folder of the job's file:" }),
      command("export FUSION_TOKEN=…   # the operator's token", "set the token"),
      command(`fusion submit job.yaml --coordinator ${here} --follow`, "submit"),
      el("p", { text: "The model is captured there as an OP-DAG; weights and data are uploaded; nothing of your code comes here. On the coordinator's own machine the command needs neither address nor token." }),
      el("h3", { text: "A job's file" }),
      el("pre", { tabindex: "0" }, el("code", { text: SPEC }))),
    section("Submit a job again, with other settings", again.element),
    section("Look before",
      command("fusion dag job.yaml --format html -o dag.html", "capture only"),
      command(`fusion workers --coordinator ${here}`, "list the workers")),
    section("Add a worker",
      el("p", { text: "An operator makes a token:" }),
      command(`fusion token create --role join --ttl 1h --coordinator ${here}`, "make a join token"),
      el("p", { text: "On the new machine run the command that it prints. It has the token, and the key by which a worker knows this coordinator." })),
  );
  return {
    title: "Submit",
    update(changes) {
      if (changes.has("job") || changes.has("open")) again.update();
    },
  };
}
