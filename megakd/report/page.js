// Figures under the pointer, the same step in all charts, and runs that can be hidden. The page is whole without this.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("figures").textContent);
  const charts = [...document.querySelectorAll(".chart")].map((chart) => ({
    area: chart.querySelector(".area"),
    cursor: chart.querySelector(".cursor"),
    at: chart.querySelector(".at"),
    unit: chart.querySelector(".values").dataset.unit,
    curves: data.charts[chart.dataset.key],
    values: [...chart.querySelectorAll(".value")].map((value) => ({
      place: value.querySelector("b"),
      rest: value.querySelector("b").textContent,
      curve: Number(value.dataset.curve),
    })),
    rest: chart.querySelector(".at").textContent,
  }));

  const figure = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e15) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 1e-3) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  };

  const nearest = (steps, step) => {
    let low = 0, high = steps.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle; else high = middle;
    }
    return step - steps[low] <= steps[high] - step ? low : high;
  };

  const show = (step) => {
    for (const chart of charts) {
      chart.cursor.style.display = "block";
      chart.cursor.style.left = `${(100 * step) / data.last}%`;
      chart.at.textContent = `step ${Math.round(step).toLocaleString("en")}`;
      for (const value of chart.values) {
        const curve = chart.curves[value.curve];
        const steps = typeof curve.x === "number" ? data.steps[curve.x] : curve.x;
        const beyond = step > steps[steps.length - 1] || step < steps[0] - data.last / 100;
        value.place.textContent = beyond ? "–" : figure(curve.y[nearest(steps, step)]) + chart.unit;
      }
    }
  };

  const rest = () => {
    for (const chart of charts) {
      chart.cursor.style.display = "none";
      chart.at.textContent = chart.rest;
      for (const value of chart.values) value.place.textContent = value.rest;
    }
  };

  for (const chart of charts) {
    chart.area.addEventListener("pointermove", (event) => {
      const box = chart.area.getBoundingClientRect();
      const share = Math.min(Math.max((event.clientX - box.left) / box.width, 0), 1);
      show(share * data.last);
    });
    chart.area.addEventListener("pointerleave", rest);
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const hidden = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!hidden));
      for (const part of document.querySelectorAll(`.chart .${button.dataset.run}`)) {
        part.classList.toggle("hidden", hidden);
      }
    });
  }
})();
