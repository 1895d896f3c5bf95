// Settings of this browser: sampling, effort, theme, model. They outlive the page.

const KEY = "zincmetal.settings";

// name, label, smallest, largest, step: the fields of a request
export const SAMPLING = [
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_p", "Top-p", 0, 1, 0.01],
  ["top_k", "Top-k", 0, 1000, 1],
  ["min_p", "Min-p", 0, 1, 0.01],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1],
  ["repeat_penalty", "Repeat penalty", 0.5, 2, 0.01],
  ["seed", "Seed", 0, 4294967295, 1],
  ["max_tokens", "Most tokens of an answer", 1, 1048576, 1],
];

const NOTHING = { sampling: {}, effort: "", theme: "", model: "" };

function stored() {
  try {
    return { ...NOTHING, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };
  } catch {
    return { ...NOTHING };
  }
}

export const settings = stored();
export const saveSettings = () => localStorage.setItem(KEY, JSON.stringify(settings));

// Fills the panel with a field for each number.
export function samplingFields(panel) {
  for (const [name, text, min, max, step] of SAMPLING) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    label.htmlFor = input.id = `sampling-${name}`;
    label.textContent = text;
    Object.assign(input, { type: "number", min, max, step: "any", value: settings.sampling[name] ?? "" });
    input.inputMode = step < 1 ? "decimal" : "numeric";
    input.addEventListener("change", () => {
      if (!input.reportValidity()) return;
      if (input.value === "") delete settings.sampling[name];
      else settings.sampling[name] = step < 1 ? Number(input.value) : Math.round(Number(input.value));
      saveSettings();
    });
    panel.append(label, input);
  }
}

const THEMES = ["", "light", "dark"];

export function showTheme() {
  if (settings.theme) document.documentElement.dataset.theme = settings.theme;
  else delete document.documentElement.dataset.theme;
}

export function nextTheme() {
  settings.theme = THEMES[(THEMES.indexOf(settings.theme) + 1) % THEMES.length];
  saveSettings();
  showTheme();
}
