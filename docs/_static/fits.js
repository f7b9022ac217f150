"use strict";
// "What fits on my card": the arithmetic of revbifpn/fits.py on its table, window.FITS = {environment, rows}.

(() => {
  const GB = 2 ** 30;
  const STATES = { sgd: 0, momentum: 1, adamw: 2 };
  const PARTS = ["activations", "images", "parameters", "gradients", "optimizer"];
  const SETTINGS = ["task", "network", "size", "setting", "optimizer", "card", "reserve"];
  const { environment, rows, absent } = window.FITS;

  const activations = (row, batch) => {
    const peaks = row.peaks;
    const [last, peak] = peaks[peaks.length - 1];
    const [first, least] = peaks[0];
    if (batch >= last) return Math.ceil(peak + row.slope * (batch - last));
    if (batch <= first) return Math.ceil((least * batch) / first);
    const i = peaks.findIndex(([n]) => n >= batch);
    const [[low, below], [high, above]] = [peaks[i - 1], peaks[i]];
    return Math.ceil(below + ((above - below) * (batch - low)) / (high - low));
  };

  const estimate = (row, batch, states) => {
    const parts = {
      activations: activations(row, batch),
      images: row.image_bytes * batch,
      parameters: row.parameter_bytes,
      gradients: row.gradient_bytes,
      optimizer: states * row.state_bytes,
    };
    return { parts, total: PARTS.reduce((sum, part) => sum + parts[part], 0) };
  };

  const largestBatch = (row, bytes, states) => {
    const fits = (batch) => estimate(row, batch, states).total <= bytes;
    if (!fits(1)) return 0;
    let [low, high] = [1, 2];
    while (fits(high)) [low, high] = [high, 2 * high];
    while (high - low > 1) {
      const middle = Math.floor((low + high) / 2);
      if (fits(middle)) low = middle;
      else high = middle;
    }
    return low;
  };

  const form = document.getElementById("fits");
  const field = (name) => form.elements[name];
  const isFast = (row) => row.variant === "fast";
  const sizeOf = (row) => row.size.join(" × ");
  const settingOf = (row) => `${row.precision}, ${row.stream} streams`;
  const unique = (values) => [...new Set(values)];
  const gigabytes = (bytes) => (bytes / GB).toFixed(2);

  const fill = (name, values) => {
    const select = field(name);
    const there = [...select.options].map((option) => option.value);
    if (there.join("|") === values.join("|")) return; // a list that is open in front of the reader stays
    const chosen = select.value;
    select.replaceChildren(...values.map((value) => new Option(value, value)));
    if (values.includes(chosen)) select.value = chosen;
  };

  const element = (name, attributes = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  };

  const offer = () => {
    fill("task", unique(rows.map((row) => row.task)));
    const ofTask = rows.filter((row) => row.task === field("task").value && isFast(row));
    fill("size", unique(ofTask.map(sizeOf)));
    const ofSize = ofTask.filter((row) => sizeOf(row) === field("size").value);
    fill("setting", unique(ofSize.map(settingOf)));
    const ofSetting = ofSize.filter((row) => settingOf(row) === field("setting").value);
    fill("network", unique(ofSetting.map((row) => row.label)));
    return ofSetting;
  };

  const memory = () => {
    const amount = (name) => Math.max(0, Number(field(name).value) || 0);
    return (amount("card") - amount("reserve")) * GB;
  };

  const showParts = (row, batch, bytes, states) => {
    const { parts, total } = estimate(row, batch || 1, states);
    const scale = 100 / Math.max(bytes, total);
    const bar = element("div", { class: "fits-parts", "aria-hidden": "true" });
    const table = element("tbody");
    for (const part of PARTS) {
      bar.append(element("span", { class: `fits-${part}`, style: `width:${parts[part] * scale}%` }));
      const name = element("th", { scope: "row" }, element("i", { class: `fits-${part}` }), ` ${part}`);
      table.append(element("tr", {}, name, element("td", { "data-part": part }, gigabytes(parts[part]))));
    }
    const sum = element("th", { scope: "row" }, batch ? "total" : "total for one image");
    table.append(element("tr", {}, sum, element("td", { "data-part": "total" }, gigabytes(total))));
    document.getElementById("fits-parts").replaceChildren(bar, element("table", {}, table));
  };

  const showRivals = (compared, chosen, bytes, states) => {
    const found = compared.map((row) => [row, largestBatch(row, bytes, states)]);
    const most = Math.max(1, ...found.map(([, batch]) => batch));
    const lines = found.map(([row, batch]) => {
      const attributes = row === chosen ? { class: "fits-chosen" } : {};
      const width = `width:${(100 * batch) / most}%`;
      const score = row.score === null ? "" : String(row.score);
      return element(
        "tr",
        attributes,
        element("th", { scope: "row" }, nameOf(row)),
        element("td", {}, score),
        element("td", { "data-batch": `${row.network}/${row.variant}` }, batch ? String(batch) : "none"),
        element("td", { class: "fits-bar", "aria-hidden": "true" }, element("span", { style: width })),
      );
    });
    document.getElementById("fits-rivals").replaceChildren(...lines);
  };

  const nameOf = (row) => (isFast(row) ? row.label : `${row.label} ${row.variant}`);

  // What the table is to have at the settings of `chosen`, and has not.
  const showMissing = (chosen) => {
    const same = (row) =>
      row.task === chosen.task &&
      row.precision === chosen.precision &&
      sizeOf(row) === sizeOf(chosen) &&
      (!isFast(row) || row.stream === chosen.stream);
    const names = absent.filter(same).map(nameOf);
    document.getElementById("fits-missing").textContent = names.length
      ? `Absent, since not in the table yet at these settings: ${names.join(", ")}.`
      : "";
  };

  const listAbsent = () => {
    const groups = new Map();
    for (const row of absent) {
      const streams = isFast(row) ? `, ${row.stream} streams` : "";
      const group = `${row.task}, ${sizeOf(row)}, ${row.precision}${streams}`;
      groups.set(group, [...(groups.get(group) || []), nameOf(row)]);
    }
    const list = document.getElementById("fits-absent");
    const lines = [...groups].map(([group, names]) => element("li", {}, `${group}: ${names.join(", ")}`));
    list.querySelector("ul").replaceChildren(...lines);
    list.querySelector("summary").textContent =
      `${absent.length} of ${absent.length + rows.length} rows are not in the table yet`;
    list.hidden = absent.length === 0;
  };

  const update = () => {
    const offered = offer();
    const chosen = offered.find((row) => row.label === field("network").value);
    const states = STATES[field("optimizer").value];
    const bytes = memory();
    const batch = largestBatch(chosen, bytes, states);
    const images = batch === 1 ? "image" : "images";
    document.getElementById("fits-batch").textContent = batch ? `${batch} ${images}` : "does not fit";
    showParts(chosen, batch, bytes, states);
    const same = (row) =>
      !isFast(row) &&
      row.task === chosen.task &&
      row.precision === chosen.precision &&
      sizeOf(row) === sizeOf(chosen);
    showRivals([...offered, ...rows.filter(same)], chosen, bytes, states);
    showMissing(chosen);
    const how = environment.measured.includes(chosen.task)
      ? "Measured on a CPU at small batches, extrapolated"
      : "Simulated";
    document.getElementById("fits-origin").textContent =
      `${how}: table of ${environment.date.slice(0, 10)}, revbifpn-fast ${environment.version} ` +
      `(${environment.commit}), torch ${environment.torch}, timm ${environment.timm}. Nothing was measured on a GPU.`;
    const state = new URLSearchParams(SETTINGS.map((name) => [name, field(name).value]));
    history.replaceState(null, "", `#${state}`);
  };

  const restore = () => {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const name of SETTINGS) {
      // From the first to the last: what is offered next depends on what was chosen before.
      if (state.has(name)) field(name).value = state.get(name);
      offer();
      if (state.has(name) && field(name).tagName === "SELECT") {
        const value = state.get(name);
        if ([...field(name).options].some((option) => option.value === value)) field(name).value = value;
      }
    }
  };

  for (const button of form.querySelectorAll("[data-card]")) {
    button.addEventListener("click", () => {
      field("card").value = button.dataset.card;
      update();
    });
  }
  form.addEventListener("input", update);
  form.addEventListener("change", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  listAbsent();
  offer();
  restore();
  form.hidden = false;
  update();
})();
